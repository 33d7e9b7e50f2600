"""The data report of a run: what the sources are and what the first window of packs looks like, as plain values."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain import storage
from posttrain.config import DataSource
from posttrain.data.counts import Counts, check_not_empty
from posttrain.data.encode import Encoder
from posttrain.data.pack import fill
from posttrain.data.report import length_report, packed_rows, preview, shares, window_counts
from posttrain.data.source import Source
from posttrain.data.stream import PackStream


def read_report(tokens_uri: str) -> dict[str, Any]:
    """The report that the step merge_tokens wrote beside the tokens."""
    return json.loads(storage.read_bytes(storage.join(tokens_uri, "report.json")))


def prompt_report(token_ids: Sequence[Sequence[int]]) -> dict[str, int]:
    """How many prompts, tokens in all, and in the longest."""
    lengths = [len(prompt) for prompt in token_ids]
    return {"prompts": len(lengths), "tokens": sum(lengths), "longest": max(lengths)}


def source_report(
    entry: DataSource,
    source: Source,
    *,
    counts: Counts | None = None,
    lengths: np.ndarray | None = None,
    duplicates: int | None = None,
) -> dict[str, Any]:
    """One source as the config has it, with what tokenising all of it came to, where that was done.

    Args:
        lengths: [N] tokens of every unit.
    """
    found = {
        "name": source.key,
        "path": entry.path if isinstance(entry.path, str) else _several(entry.path),
        "format": entry.format,
        "fingerprint": source.fingerprint,
        "weight": [list(point) for point in entry.schedule],
        "epochs": entry.epochs,
        "duplicates": duplicates,
        **length_report(np.empty(0, np.int64) if lengths is None else lengths),
        **(counts or Counts()).plain(),
    }
    return found | {"rows": source.num_rows}


def _several(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{len(paths):,} files, {paths[0]} to {paths[-1]}"


def first_window_report(stream: PackStream | None, described: list[dict[str, Any]], encoder: Encoder) -> dict[str, Any]:
    """Mixture, fill, a mask and packed rows of window 0; of a source that was not tokenised, its counts too.

    Raises:
        DataError: no row of the window is left to train on.
    """
    if stream is None:
        return {"sources": [], "predicted_fill": None, "preview": [], "packs": []}
    window, mixture = stream.window(0), stream.mixture
    counted = window_counts(window, mixture, unknown_id=encoder.unknown_id)
    if not window.packs:
        check_not_empty(Counts.total([counts.plain() for counts, _ in counted]), key="data.sources")
    sources = []
    for about, share, (counts, lengths) in zip(described, shares(window, mixture), counted, strict=True):
        found = {} if about["units"] else counts.plain() | length_report(lengths) | {"rows": about["rows"]}
        sources.append(about | found | {"share": share})
    return {
        "sources": sources,
        "predicted_fill": round(fill(window.packs, pack_tokens=stream.pack_tokens), 4),
        "preview": preview(window.packs[0].samples[0], encoder.tokenizer),
        "packs": packed_rows(window, mixture),
    }
