"""Sources and model become folders of the run, published with hashes: the snapshot that everything later reads."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain import storage
from posttrain.config import RunConfig
from posttrain.data.record_checks import question_hash
from posttrain.data.source import Source, as_files, read_rows, stored_rows, write_rows
from posttrain.data.train_tokenizer import train_tokenizer
from posttrain.data.types import Row
from posttrain.errors import ModelError, RowError
from posttrain.manifest import MANIFEST, read_manifest
from posttrain.model.backend import backend_of
from posttrain.model.build import build_model, fresh_config
from posttrain.model.heads import FOLDER as HEADS
from steps.streams import row_reader, shares_of, store_sources, stored_sources

TEXT_FILES = (".json", ".jinja", ".txt", ".model")
"""What a model's folder holds beside its weights: config, tokenizer, chat template."""

VOCABULARY_ROWS = 100_000
"""Rows of each source that a fresh model's tokenizer is trained on."""


def prepare(config: RunConfig, *, root: str) -> dict[str, Any]:
    """Snapshot prompts and held-out rows, index the training sources, and bring or build the model.

    Returns:
        data: uri, rows per set and sha256 per file.
        model: uri and architecture.
        parts: shares of tokenising the training sources, [source, first block, end block].

    Raises:
        DataError: a source is empty or malformed, or prompts repeat held-out rows.
        ModelError: the model folder is not one that model.backend can load.
    """
    data_uri, model_uri = storage.join(root, "data"), storage.join(root, "model")
    storage.ensure_folder(data_uri, lambda folder: write_data(config, root=root, folder=folder))
    folder = storage.fetch(data_uri)
    rows = {name: stored_rows(folder / f"{name}.parquet") for name in ("prompts", "held_out")}
    sources = stored_sources(folder)
    storage.ensure_folder(
        model_uri, lambda target: _write_model(config, target, vocabulary_texts(config, rows, sources))
    )
    shape = backend_of(config.model.backend).shape(storage.fetch(model_uri))
    files = read_manifest(folder)["files"]
    return {
        "data": {
            "uri": data_uri,
            "rows": {name: len(found) for name, found in rows.items()},
            "sha256": {name: entry["sha256"] for name, entry in files.items()},
        },
        "model": {"uri": model_uri, "family": shape.family, "hidden_size": shape.hidden_size},
        "parts": shares_of(sources) if config.data.tokenize == "ahead" else shares_of([]),
    }


def open_sources(config: RunConfig, *, root: str) -> list[Source]:
    """The training sources of the config, indexed; the rows of a function become a file below `root`."""
    if config.warmup is None:
        return []
    return [
        as_files(
            entry.path,
            key=f"data.sources[{number}]",
            seed=config.seed,
            uri=storage.join(root, "rows", f"source_{number:03d}"),
        )
        for number, entry in enumerate(config.data.sources)
    ]


def write_data(config: RunConfig, *, root: str, folder: Path) -> None:
    """Write the rows of prompts and held-out questions, and the index of the training sources, into `folder`."""
    held_out = read_rows(config.data.held_out, key="data.held_out", seed=config.seed, wanted="prompt")
    reserved = frozenset(question_hash(row) for row in held_out)
    prompts = read_rows(config.data.prompts, key="data.prompts", seed=config.seed, wanted="prompt", held_out=reserved)
    write_rows(held_out, folder / "held_out.parquet")
    write_rows(prompts, folder / "prompts.parquet")
    store_sources(open_sources(config, root=root), folder)


def vocabulary_texts(config: RunConfig, rows: dict[str, list[Row]], sources: Sequence[Source]) -> Iterator[str]:
    """What a fresh model's tokenizer learns its vocabulary from. Bad rows are left out here, and counted later."""
    readers = [row_reader(entry) for entry in config.data.sources]
    found = [each for name in ("held_out", "prompts") for each in rows[name]]
    for source, read in zip(sources, readers, strict=False):
        for _, _, record in islice(source.in_order(), VOCABULARY_ROWS):
            with suppress(RowError):
                found.append(read(record))
    for row in found:
        for message in row["messages"]:
            yield f"{message['role']}\n{message['content'] or ''}\n"


def model_folder(path: str, revision: str | None, *, suffixes: tuple[str, ...]) -> Path:
    """The model's files that end in one of `suffixes` on this machine, downloaded if they are not.

    Raises:
        ModelError: the hub does not give them.
    """
    if storage.is_s3(path):
        return storage.download(path, suffixes=suffixes)
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [f"*{suffix}" for suffix in suffixes]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"model.path: cannot download {path} at revision {revision}: {reason}") from None


def _write_model(config: RunConfig, folder: Path, texts: Iterator[str]) -> None:
    if config.model.fresh:
        size = train_tokenizer(texts, folder, vocab_size=config.model.fresh.vocab_size)
        shape = config.model.fresh.model_dump(exclude={"vocab_size"})
        shape |= {"mlp_size": 4 * config.model.fresh.hidden_size, "max_length": config.data.pack_tokens}
        build_model(folder, fresh_config(vocab_size=size, **shape), seed=config.seed)
        return
    assert config.model.path is not None, "the config's own check lets exactly one of path and fresh through"
    source = model_folder(config.model.path, config.model.revision, suffixes=(*TEXT_FILES, ".safetensors"))
    backend_of(config.model.backend).shape(source)
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors":
            _link(path.resolve(), folder / path.name)
        elif path.suffix in TEXT_FILES and path.name != MANIFEST:
            shutil.copyfile(path, folder / path.name)
    if Path(source, HEADS).is_dir():
        shutil.copytree(source / HEADS, folder / HEADS)
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"model.path: {config.model.path} holds no .safetensors file")


def _link(source: Path, target: Path) -> None:
    """A hard link where the file system allows it, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


if __name__ == "__main__":
    from steps.program import main

    main(prepare)
