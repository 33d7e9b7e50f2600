"""All shares together, and the prompts: the folder that training reads, and the report that people read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain import storage
from posttrain.config import RunConfig
from posttrain.data.counts import Counts, check_budget, check_not_empty
from posttrain.data.encode import CHOSEN_DROPS, Encoder
from posttrain.data.prompts import tokenize_prompts, write_prompts
from posttrain.data.slices import slice_of
from posttrain.data.source import Source, stored_rows
from posttrain.data.stream import PackStream
from posttrain.data.token_files import lengths_and_duplicates, write_units
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.types import Unit
from posttrain.errors import DataError, RowError
from posttrain.model.backend import backend_of
from posttrain.model.families import DecoderConfig
from posttrain.workflow.measures import check_slices
from steps.data_report import first_window_report, prompt_report, read_report, source_report
from steps.recipes import prompt_sets
from steps.streams import (
    HELD_OUT_SLICES,
    HELD_OUT_UNITS,
    PROVED_ROWS,
    RESERVED,
    make_encoder,
    pack_stream,
    record_units,
    reserved_hashes,
    store_sources,
    stored_sources,
    token_units,
    units_schema,
)


def merge_tokens(
    config: RunConfig, *, root: str, data_uri: str, model_uri: str, parts: list[dict[str, Any]]
) -> dict[str, Any]:
    """Check what the shares came to as one set, tokenise the prompts, and look at the first window of packs.

    Args:
        parts: what tokenize() returned for each share.

    Returns:
        uri of the folder, fingerprint of the tokenizer, and the counts of every source.

    Raises:
        DataError: a source of which nothing is left, too many bad rows, or a prompt longer than its limit.
    """
    data, model = storage.fetch(data_uri), storage.fetch(model_uri)
    tokenizer, shape = BaseHFModelTokenizer(model), backend_of(config.model.backend).shape(model)
    encoder = make_encoder(config, tokenizer, shape, prove=PROVED_ROWS)
    uri = storage.join(root, "tokens", "all")

    def write(folder: Path) -> None:
        prompts = _write_prompts(config, data, folder, tokenizer, shape)
        _write_held_out(config, data, folder, encoder)
        sources, stream, described = _training_set(config, data, parts, encoder)
        store_sources(sources, folder)
        reserved = sorted(each.hex() for each in reserved_hashes(data))
        (folder / RESERVED).write_text(json.dumps(reserved))
        report = {
            "scope": "all rows" if config.data.tokenize == "ahead" else "the first 1,024 draws",
            "tokenizer_sha256": tokenizer.fingerprint(),
            "pack_tokens": config.data.pack_tokens,
            "prompts": prompts,
            **first_window_report(stream, described, encoder),
        }
        if config.data.tokenize == "online":
            check_budget(
                [Counts.total([source]) for source in report["sources"]], max_bad_rows=config.data.max_bad_rows
            )
        (folder / "report.json").write_text(json.dumps(report))

    storage.ensure_folder(uri, write)
    report = read_report(uri)
    kept = ("name", "rows", "units", "tokens", "loss_tokens", "duplicates", "dropped", "fingerprint")
    return {
        "uri": uri,
        "tokenizer_sha256": report["tokenizer_sha256"],
        "predicted_fill": report["predicted_fill"],
        "prompts": report["prompts"],
        "sources": [{name: source[name] for name in kept} for source in report["sources"]],
    }


def _write_prompts(
    config: RunConfig, data: Path, folder: Path, tokenizer: BaseHFModelTokenizer, shape: DecoderConfig
) -> dict[str, Any]:
    need = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if config.samples_completions and need > shape.max_length:
        raise DataError(
            f"data.max_prompt_tokens + rollout.max_new_tokens = {need}; the model holds {shape.max_length} tokens"
        )
    stats = {}
    for name, (key, _) in prompt_sets(config).items():
        rows, limit = stored_rows(data / f"{name}.parquet"), config.data.max_prompt_tokens
        ids = tokenize_prompts(rows, tokenizer, key=key, max_prompt_tokens=limit)
        write_prompts(rows, ids, folder / f"{name}.parquet")
        stats[name] = prompt_report(ids)
    return stats


def _write_held_out(config: RunConfig, data: Path, folder: Path, encoder: Encoder) -> None:
    """The held-out rows of an offline recipe, tokenised as its training rows are; none of them may be unfit."""
    if config.method.name == "grpo":
        return
    rows, units, slices = stored_rows(data / "held_out.parquet"), list[Unit](), list[str]()
    column = config.eval.slice_by
    for number, (row, found) in enumerate(zip(rows, encoder(rows), strict=True)):
        if isinstance(found, RowError):
            if found.reason not in CHOSEN_DROPS:
                raise DataError(f"data.held_out, row {number}: {found}")
            continue
        units += found
        slices += [] if column is None else [slice_of(row, column)] * len(found)
    if not units:
        raise DataError("data.held_out: no row is left to evaluate on; raise data.pack_tokens, or bring shorter rows")
    write_units(((unit, None) for unit in units), folder / HELD_OUT_UNITS, schema=units_schema(config))
    if column is not None:
        check_slices(config.eval.gate, column, slices)  # all rows of one may have been too long
        (folder / HELD_OUT_SLICES).write_text(json.dumps(slices))


def _training_set(
    config: RunConfig,
    data: Path,
    parts: list[dict[str, Any]],
    encoder: Encoder,
) -> tuple[Sequence[Source], PackStream | None, list[dict[str, Any]]]:
    """The sources that the stream draws from, the stream (None without a warm-up), and each source described."""
    raw = stored_sources(data)
    if not raw:
        return [], None, []
    if config.data.tokenize == "online":
        stream = pack_stream(config, record_units(config, raw, encoder, reserved=reserved_hashes(data)), raw)
        return raw, stream, [source_report(entry, source) for entry, source in _pairs(config, raw)]
    counts = [Counts.total([p["counts"] for p in parts if p["source"] == n]) for n in range(len(raw))]
    check_budget(counts, max_bad_rows=config.data.max_bad_rows)
    tokens, described = [], []
    for number, (entry, source) in enumerate(_pairs(config, raw)):
        check_not_empty(counts[number], key=source.key)
        uris = [storage.join(p["uri"], "units.parquet") for p in parts if p["uri"] and p["source"] == number]
        found = Source(uris, key=source.key)
        lengths, duplicates = lengths_and_duplicates(found)
        about = source_report(entry, source, counts=counts[number], lengths=lengths, duplicates=duplicates)
        tokens.append(found)
        described.append(about)
    return tokens, pack_stream(config, token_units(config, tokens), tokens), described


def _pairs(config: RunConfig, sources: Sequence[Source]) -> list[tuple[Any, Source]]:
    return list(zip(config.data.sources, sources, strict=True))


if __name__ == "__main__":
    from steps.program import main

    main(merge_tokens)
