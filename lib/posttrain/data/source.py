"""Bytes on disk or S3, or a generating function, become Rows; and back, as Parquet.

A Source addresses the records of many files by (block, row in the block), so that a reader
can go anywhere without reading what lies before. What a record means is in records.py.
"""

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from posttrain import storage
from posttrain.data.files import File, list_files
from posttrain.data.row_reader import RowReader
from posttrain.data.shards import SUFFIXES, Block, Reader, Records, Shard, index, line_number, take
from posttrain.data.types import Row
from posttrain.errors import DataError, RowError
from posttrain.manifest import json_sha256
from posttrain.plugin import resolve

HELD_BYTES = 64 * 1024 * 1024
"""Decoded blocks a source keeps: two groups of BlockOrder, the one being read and the next."""

OPEN_FILES = 32
"""Files a source keeps open; a set may have thousands, and a process may open about one."""


class Source:
    """The records of a file, a folder, a Hugging Face dataset on disk, or a glob; local or s3://.

    Raises:
        DataError: nothing there, or a file that is truncated, damaged or of another kind.
    """

    def __init__(self, uri: str | Sequence[str], *, key: str, shards: Sequence[Shard] | None = None):
        """
        Args:
            uri: one or several.
            key: where the config names the source, for errors: `data.prompts`.
            shards: its files, indexed already; None finds and indexes them.
        """
        self.uri, self.key = uri, key
        try:
            if shards is None:
                uris = [uri] if isinstance(uri, str) else uri
                shards = [index(file) for each in uris for file in data_files(each)]
        except DataError as error:
            raise DataError(f"{key}: {error}") from None
        self.shards = list(shards)
        self._places = [(s, b) for s, shard in enumerate(self.shards) for b in range(len(shard.blocks))]
        blocks = [self.shards[s].blocks[b] for s, b in self._places]
        self.block_rows = np.array([block.rows for block in blocks], np.int64)
        self.block_bytes = np.array([block.bytes for block in blocks], np.int64)
        self.num_rows = int(self.block_rows.sum())
        if not self.num_rows:
            raise DataError(f"{key}: {uri} has no rows")
        self.fingerprint = json_sha256([shard.fingerprint for shard in self.shards])
        self._readers: OrderedDict[int, Reader] = OrderedDict()
        self._held: OrderedDict[int, Records] = OrderedDict()

    @staticmethod
    def indexed(index: dict[str, Any]) -> "Source":
        """The source that `plain_index()` describes; its files are not looked at before they are read."""
        shards = [
            Shard(
                file=File(uri=shard["uri"], size=shard["size"], version=shard["version"]),
                fingerprint=shard["fingerprint"],
                blocks=tuple(Block(rows=r, bytes=b, offset=o, length=n) for r, b, o, n in shard["blocks"]),
            )
            for shard in index["shards"]
        ]
        return Source(index["uri"], key=index["key"], shards=shards)

    def plain_index(self) -> dict[str, Any]:
        """Its files and their blocks as plain values: made once a run, so that no other reader looks for them."""
        shards = [
            {
                "uri": shard.file.uri,
                "size": shard.file.size,
                "version": shard.file.version,
                "fingerprint": shard.fingerprint,
                "blocks": [[block.rows, block.bytes, block.offset, block.length] for block in shard.blocks],
            }
            for shard in self.shards
        ]
        return {"uri": self.uri, "key": self.key, "shards": shards}

    def records(self, blocks: np.ndarray, rows: np.ndarray) -> list[dict[str, Any] | RowError]:
        """Records at [N] blocks and [N] rows within them, in that order; a RowError where one is no record.

        Raises:
            DataError: a block's bytes are damaged.
        """
        found: list[Any] = [None] * len(blocks)
        for block in np.unique(blocks):
            here = np.flatnonzero(blocks == block)
            for place, record in zip(here, take(self.block(int(block)), rows[here].tolist()), strict=True):
                found[place] = record
        return found

    def in_order(self) -> Iterator[tuple[int, int, dict[str, Any] | RowError]]:
        """Every record once, in file order, with its block and its row there."""
        for block, count in enumerate(self.block_rows.tolist()):
            for row, record in enumerate(take(self.block(block), range(count))):
                yield block, row, record

    def read_ahead(self, blocks: Sequence[int]) -> None:
        """Begin to fetch blocks that will be wanted soon; returns at once."""
        for block in blocks:
            if block not in self._held:
                shard, number = self._places[block]
                self._reader(shard).read_ahead(number)

    def where(self, block: int, row: int) -> str:
        """A record's place as a person looks it up: the file, and its line (JSONL) or row from 0."""
        shard, number = self._places[block]
        file = self.shards[shard].file
        if file.uri.endswith(".jsonl"):
            return f"{file.uri}:{line_number(self.shards[shard], number, row)}"
        return f"{file.uri}, row {sum(b.rows for b in self.shards[shard].blocks[:number]) + row}"

    def block(self, block: int) -> Records:
        """All rows of a block, not yet Python objects; the latest blocks stay in memory.

        Raises:
            DataError: its bytes are damaged.
        """
        if block not in self._held:
            shard, number = self._places[block]
            try:
                self._held[block] = self._reader(shard).read(number)
            except DataError as error:
                raise DataError(f"{self.key}: {error}") from None
            while len(self._held) > 1 and self.block_bytes[list(self._held)].sum() > HELD_BYTES:
                self._held.popitem(last=False)
        self._held.move_to_end(block)
        return self._held[block]

    def _reader(self, shard: int) -> Reader:
        if shard not in self._readers:
            self._readers[shard] = Reader(self.shards[shard])
            if len(self._readers) > OPEN_FILES:
                self._readers.popitem(last=False)[1].close()
        self._readers.move_to_end(shard)
        return self._readers[shard]


def is_file(source: str) -> bool:
    """Whether a config's source names files, and not a function."""
    return "/" in source or ":" not in source


def check_source(source: str | Sequence[str], *, key: str) -> None:
    """Refuse a source, or one of several, that cannot be read, without reading it.

    Raises:
        DataError: no such file, or not a known file type.
        ConfigError: no such function.
    """
    if not isinstance(source, str):
        for each in source:
            check_source(each, key=key)
        return
    if not is_file(source):
        resolve(source, key=key)
        return
    try:
        data_files(source)
    except DataError as error:
        where = (
            "" if storage.is_s3(source) or "\0" in source else f" (looked for {Path(source).expanduser().resolve()})"
        )
        raise DataError(f"{key}: {error}{where}") from None


def as_files(path: str | Sequence[str], *, key: str, seed: int, uri: str) -> Source:
    """A Source of what a config names; the rows of a function are first published as the folder `uri`.

    Raises:
        DataError: no rows, or one that JSON cannot hold.
    """
    if not isinstance(path, str) or is_file(path):
        return Source(path, key=key)

    def write(folder: Path) -> None:
        with open(folder / "rows.jsonl", "w") as file:
            file.writelines(f"{line}\n" for line in _json_lines(resolve(path, key=key)(seed), f"{key}: {path}"))

    storage.ensure_folder(uri, write)
    return Source(storage.join(uri, "rows.jsonl"), key=key)


def read_rows(source: str, *, key: str, seed: int, **reading: Any) -> list[Row]:
    """All rows of a source, in order.

    Args:
        reading: of RowReader: what is wanted, what is held out, and the rest.

    Raises:
        DataError: empty, or names the file and line whose record is not what is wanted or asks what is `held_out`.
    """
    files = Source(source, key=key) if is_file(source) else None
    records = files.in_order() if files else _function_records(source, key, seed)
    rows, read = [], RowReader(**reading)
    for block, number, record in records:
        try:
            rows.append(read(record))
        except DataError as error:
            where = files.where(block, number) if files else f"{source}, row {number}"
            raise DataError(f"{key}: {where}: {error}") from None
    if not rows:
        raise DataError(f"{key}: {source} has no rows")
    return rows


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """One Parquet file; every row as JSON in column `row`.

    Raises:
        DataError: names the row that JSON cannot hold: dates, bytes, numpy values.
    """
    lines = list(_json_lines(rows, f"data.{path.stem}"))
    pq.write_table(pa.table({"row": lines}), path, write_page_checksum=True)


def stored_rows(path: Path) -> list[Row]:
    """Read what write_rows() wrote."""
    column = pq.read_table(path, page_checksum_verification=True)["row"]
    return [json.loads(value.as_py()) for value in column]


def _json_lines(rows: Iterable[Any], where: str) -> Iterator[str]:
    for number, row in enumerate(rows):
        try:
            yield json.dumps(row)
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}, row {number}: {error}; keep to strings, numbers, lists and maps") from None


def _described(uri: str, key: str, kind: type) -> list[Any]:
    """A list of one kind that a file of Hugging Face's has under a key; empty where it has none."""
    try:
        found = json.loads(storage.read_bytes(uri)).get(key) or []
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{uri} is no description of a dataset: {error}; save the dataset again") from None
    if not isinstance(found, list) or not all(isinstance(entry, kind) for entry in found):
        raise DataError(f"{uri}: {key} is {str(found)[:80]!r}; save the dataset again")
    return found


def _function_records(source: str, key: str, seed: int) -> Iterator[tuple[int, int, Any]]:
    for number, record in enumerate(resolve(source, key=key)(seed)):
        yield 0, number, record


def data_files(uri: str) -> list[File]:
    """The data files below a URI. A Hugging Face dataset names its own, among cache files that are not data."""
    if "\0" in uri:
        raise DataError(f"{uri!r} is no path: it holds a NUL")
    uri = uri if storage.is_s3(uri) else str(Path(uri).expanduser())
    if storage.exists(storage.join(uri, "dataset_dict.json")):
        splits = _described(storage.join(uri, "dataset_dict.json"), "splits", str)
        one = splits[0] if splits else "train"
        raise DataError(f"{uri} holds the splits {', '.join(splits)}; name one of them: {uri.rstrip('/')}/{one}")
    files = list_files(uri, suffixes=SUFFIXES)
    state_file = storage.join(uri, "state.json")
    if not storage.exists(state_file):
        return files
    if _described(state_file, "_indices_data_files", object):
        raise DataError(f"{uri} is a selection of another dataset's rows; call flatten_indices() before saving it")
    named = [str(entry.get("filename")) for entry in _described(state_file, "_data_files", dict)]
    below = {file.uri.rsplit("/", 1)[-1]: file for file in files}
    missing = [name for name in named if name not in below]
    if missing:
        raise DataError(f"{uri}: state.json names {missing[0]}, which is not there; save the dataset again")
    return [below[name] for name in named]
