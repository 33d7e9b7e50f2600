"""Prompts: tokenised once, on disk beside the row that their reward reads."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.types import Row
from posttrain.errors import DataError, RowError


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
