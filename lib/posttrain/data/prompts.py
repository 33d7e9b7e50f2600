"""Token Parquet: tokenised samples on disk, and the numbers that describe them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.types import Row, Sample
from posttrain.errors import DataError, RowError

PROVED_ROWS = 256
"""Rows whose prompt is rendered a second time, to prove that it is served as it was trained."""


def tokenize_conversations(rows: Sequence[Row], tokenizer: BaseHFModelTokenizer, *, key: str) -> list[Sample]:
    """Conversations become Samples; a message's `weight` multiplies its loss.

    Raises:
        DataError: names the row that trains no token, or would be served otherwise than trained.
    """
    samples = []
    for number, (row, encoded) in enumerate(zip(rows, tokenizer.conversations(rows, "weights"), strict=True)):
        try:
            if isinstance(encoded, RowError):
                raise encoded
            samples.append(shift(encoded.token_ids, encoded.loss_mask))
            if number < PROVED_ROWS:
                tokenizer.check_no_skew(row["messages"], row.get("tools"))
        except DataError as error:
            raise DataError(f"{key}, row {number}: {error}") from None
    return samples


def tokenize_prompts(
    rows: Sequence[Row], tokenizer: BaseHFModelTokenizer, *, key: str, max_prompt_tokens: int
) -> list[tuple[int, ...]]:
    """Prompts become ids, the opening of the assistant's turn included.

    Raises:
        DataError: names the row that ends with an assistant turn, cannot be rendered, or is
            longer than the limit.
    """
    prompts = []
    for number, ids in enumerate(tokenizer.prompts(rows)):
        if isinstance(ids, RowError):
            raise DataError(f"{key}, row {number}: {ids}")
        if len(ids) > max_prompt_tokens:
            raise DataError(
                f"{key}, row {number}: the prompt has {len(ids)} tokens, data.max_prompt_tokens is "
                f"{max_prompt_tokens}; raise it or shorten the prompt"
            )
        prompts.append(tuple(ids.tolist()))
    return prompts


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """Columns input_ids, target_ids, loss_mask and length, one row per sample, page checksums on."""
    table = pa.table(
        {
            "input_ids": pa.array([s.input_ids for s in samples], pa.list_(pa.int32())),
            "target_ids": pa.array([s.target_ids for s in samples], pa.list_(pa.int32())),
            "loss_mask": pa.array([s.loss_mask for s in samples], pa.list_(pa.float32())),
            "length": pa.array([len(s) for s in samples], pa.int32()),
        }
    )
    pq.write_table(table, path, write_page_checksum=True)


def read_samples(path: Path) -> list[Sample]:
    """What write_samples() wrote; page checksums verified."""
    table = pq.read_table(path, page_checksum_verification=True)
    columns = {
        name: (table[name].combine_chunks().values.to_numpy(), table[name].combine_chunks().offsets.to_numpy())
        for name in ("input_ids", "target_ids", "loss_mask")
    }
    return [
        Sample(**{name: values[offsets[i] : offsets[i + 1]] for name, (values, offsets) in columns.items()})
        for i in range(table.num_rows)
    ]


def write_prompts(rows: Sequence[Row], token_ids: Sequence[tuple[int, ...]], path: Path) -> None:
    """Columns row (JSON) and input_ids, one row per prompt."""
    table = pa.table(
        {
            "row": [json.dumps(row, ensure_ascii=False) for row in rows],
            "input_ids": pa.array(token_ids, pa.list_(pa.int32())),
        }
    )
    pq.write_table(table, path, write_page_checksum=True)


def read_prompts(path: Path) -> tuple[list[Row], list[tuple[int, ...]]]:
    """What write_prompts() wrote."""
    table = pq.read_table(path, page_checksum_verification=True)
    rows = [json.loads(value.as_py()) for value in table["row"]]
    return rows, [tuple(ids) for ids in table["input_ids"].to_pylist()]


def describe(samples: Sequence[Sample], *, pack_tokens: int) -> dict[str, Any]:
    """Counts, length quantiles and the fill that packing will reach, as plain values."""
    lengths = np.array([len(sample) for sample in samples])
    window = [(sample,) for sample in samples[:1024]]
    packs = pack(window, pack_tokens=pack_tokens)
    return {
        "samples": len(samples),
        "tokens": int(lengths.sum()),
        "loss_tokens": int(sum(sample.loss_mask.sum() for sample in samples)),
        "length_quantiles": {f"p{q}": int(np.percentile(lengths, q)) for q in (0, 50, 90, 99, 100)},
        "pack_tokens": pack_tokens,
        "predicted_fill": round(sum(p.num_tokens for p in packs) / (len(packs) * pack_tokens), 4),
    }
