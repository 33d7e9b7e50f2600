"""A share of the token files gets what the teacher says of it, before the first step of an offline distillation.

Shares run beside each other, each with the teacher on one device; then all become the folder that training reads.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from posttrain import storage
from posttrain.compute.device import set_up_device
from posttrain.config import Distill, RunConfig
from posttrain.data.source import Source
from posttrain.data.token_files import TAUGHT, UnitsFile, block_units, read_units, write_units
from posttrain.errors import DataError
from posttrain.model.backend import backend_of
from posttrain.workflow.teacher import Teacher
from steps.annotate import FOLDER
from steps.streams import HELD_OUT_SLICES, HELD_OUT_UNITS, RESERVED, shares_of, store_sources, stored_sources

HELD_OUT = -1
"""Stands for the held-out rows in a share, where the number of a source stands."""

PART_BYTES = 16 * 1024 * 1024
"""Of compressed token Parquet in a share, some millions of tokens: a task that is worth its start and is lost alone."""


def shares(config: RunConfig, *, tokens_uri: str) -> list[list[int]]:
    """Shares of the teacher's work: [source, first block, end block]; one empty share where nothing is written down."""
    if not _top_k(config):
        return shares_of([])
    return [[HELD_OUT, 0, 1], *shares_of(stored_sources(storage.fetch(tokens_uri)), part_bytes=PART_BYTES)]


def teach(
    config: RunConfig, *, root: str, model_uri: str, teacher_uri: str | None, tokens_uri: str, part: Sequence[int]
) -> dict[str, object]:
    """Write token Parquet of one share with the teacher's top k.

    Returns:
        uri of the folder, None for an empty share; and the source.

    Raises:
        DataError: method.top_k is more than there are tokens.
    """
    number, first, end = part
    if first == end:
        return {"uri": None, "source": number}
    name = "held_out" if number == HELD_OUT else f"source_{number:03d}_block_{first:06d}"
    uri = storage.join(root, "tokens", f"taught_{name}")

    def write(folder: Path) -> None:
        teacher, tokens = _teacher(config, model_uri, teacher_uri), storage.fetch(tokens_uri)
        path = folder / "units.parquet"
        if number == HELD_OUT:
            units = teacher.teach(read_units(tokens / HELD_OUT_UNITS))
            write_units(((unit, None) for unit in units), path, schema=TAUGHT)
            return
        source = stored_sources(tokens)[number]
        with UnitsFile(path, schema=TAUGHT) as file:
            for block in range(first, end):
                hashed = block_units(source, block)
                taught = teacher.teach([unit for unit, _ in hashed])
                for unit, (_, row_hash) in zip(taught, hashed, strict=True):
                    file.add(unit, row_hash)

    storage.ensure_folder(uri, write)
    return {"uri": uri, "source": number}


def merge_taught(config: RunConfig, *, root: str, tokens_uri: str, parts: Sequence[dict]) -> str:
    """All shares as the folder that training reads; the tokens as they are where nothing was written down.

    Args:
        parts: what teach() returned for each share, in the shares' order.
    """
    if not _top_k(config):
        return tokens_uri
    uri, tokens = storage.join(root, "tokens", FOLDER), storage.fetch(tokens_uri)

    def write(folder: Path) -> None:
        sources = []
        for number, source in enumerate(stored_sources(tokens)):
            uris = [storage.join(part["uri"], "units.parquet") for part in parts if part["source"] == number]
            sources.append(Source(uris, key=source.key))
        store_sources(sources, folder)
        shutil.copyfile(tokens / RESERVED, folder / RESERVED)
        (held_out,) = (part["uri"] for part in parts if part["source"] == HELD_OUT)
        shutil.copyfile(storage.fetch(held_out) / "units.parquet", folder / HELD_OUT_UNITS)
        if (tokens / HELD_OUT_SLICES).exists():
            shutil.copyfile(tokens / HELD_OUT_SLICES, folder / HELD_OUT_SLICES)

    storage.ensure_folder(uri, write)
    return uri


def _top_k(config: RunConfig) -> int | None:
    return config.method.top_k if isinstance(config.method, Distill) else None


def _teacher(config: RunConfig, model_uri: str, teacher_uri: str | None) -> Teacher:
    """The teacher on this process's device, in the precision that training would compute in."""
    method, backend, top_k = config.method, backend_of(config.model.backend), _top_k(config)
    assert isinstance(method, Distill) and top_k and teacher_uri is not None, "only an offline distillation is taught"
    vocab_size = backend.shape(storage.fetch(model_uri)).vocab_size
    if top_k > vocab_size:
        raise DataError(f"method.top_k = {top_k} is more than the student's {vocab_size} tokens; set it lower")
    device = set_up_device(deterministic=config.optim.deterministic)
    precision = config.optim.precision
    narrow = precision.startswith(("bfloat16", "float8")) or (precision, device.type) == ("auto", "cuda")
    model = backend.load(
        storage.fetch(teacher_uri), device=device, dtype=torch.bfloat16 if narrow else torch.float32
    ).requires_grad_(False)
    return Teacher(
        model=model,
        vocab_size=vocab_size,
        top_k=top_k,
        temperature=method.temperature,
        pack_tokens=config.data.pack_tokens,
    )


if __name__ == "__main__":
    from steps.program import main

    main(teach)
