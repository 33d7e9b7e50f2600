"""Bytes on disk or S3, or a generating function, become Rows; and back, as Parquet."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from posttrain import storage
from posttrain.data.types import Row
from posttrain.errors import DataError
from posttrain.plugin import resolve

FILE_TYPES = (".jsonl", ".parquet")


def is_file(source: str) -> bool:
    """Whether a config's source names a file, and not a function."""
    return source.endswith(FILE_TYPES) or "/" in source


def check_source(source: str, *, key: str) -> None:
    """Refuse a source that cannot be read, without reading it.

    Raises:
        DataError: no such file, or not a known file type.
        ConfigError: no such function.
    """
    if not is_file(source):
        resolve(source, key=key)
        return
    if not source.endswith(FILE_TYPES):
        raise DataError(f"{key}: {source}: known file types are {', '.join(FILE_TYPES)}")
    if not storage.exists(source):
        where = "" if storage.is_s3(source) else f" (looked for {Path(source).resolve()})"
        raise DataError(f"{key}: {source} does not exist{where}")


def read_rows(source: str, *, key: str, seed: int) -> list[Row]:
    """All rows of a source, in order.

    Raises:
        DataError: empty, or names the file and line that is not a record.
    """
    if not is_file(source):
        rows = list(resolve(source, key=key)(seed))
    elif source.endswith(".parquet"):
        rows = _parquet_rows(source, key)
    else:
        rows = list(_jsonl_rows(source, key))
    if not rows:
        raise DataError(f"{key}: {source} has no rows")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{key}: {source}, row {number}: expected a record, got {type(row).__name__}")
    return rows


def row_messages(row: Row) -> list[dict[str, Any]]:
    """The conversation of a row: its `messages`, or its `prompt` as one user message.

    Raises:
        DataError: it has neither, or messages that are not a list of mappings.
    """
    messages = row.get("messages")
    if messages is None and isinstance(row.get("prompt"), str):
        return [{"role": "user", "content": row["prompt"]}]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"neither `messages` nor `prompt`; found keys {sorted(row)}")
    if not all(isinstance(message, dict) for message in messages):
        raise DataError(f"messages must be mappings with role and content, got {str(messages)[:200]}")
    return messages


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """One Parquet file; every row as JSON in column `row`.

    Raises:
        DataError: names the row that JSON cannot hold: dates, bytes, numpy values.
    """
    lines = []
    for number, row in enumerate(rows):
        try:
            lines.append(json.dumps(row))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"data.{path.stem}, row {number}: {error}; keep to strings, numbers, lists and maps"
            ) from None
    pq.write_table(pa.table({"row": lines}), path, write_page_checksum=True)


def stored_rows(path: Path) -> list[Row]:
    """Read what write_rows() wrote."""
    column = pq.read_table(path, page_checksum_verification=True)["row"]
    return [json.loads(value.as_py()) for value in column]


def _parquet_rows(source: str, key: str) -> list[Row]:
    data = io.BytesIO(storage.read_bytes(source))
    try:
        return pq.read_table(data, page_checksum_verification=True).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:  # a page's checksum is an OSError
        raise DataError(f"{key}: {source} is not a whole Parquet file: {error}") from None


def _jsonl_rows(source: str, key: str) -> Iterator[Row]:
    for number, line in enumerate(storage.read_bytes(source).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{key}: {source}:{number}: byte {error.start} is not UTF-8") from None
        except json.JSONDecodeError as error:
            raise DataError(f"{key}: {source}:{number}: not JSON: {error}") from None
