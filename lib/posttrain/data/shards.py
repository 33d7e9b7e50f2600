"""One file of records, indexed into blocks that can be read on their own: JSONL, Parquet, Arrow.

A block is a Parquet row group, an Arrow record batch, or some megabytes of JSON lines. The
index costs a footer (Parquet), the batches' headers (Arrow files) or one pass that counts
lines (JSONL, Arrow streams).
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from posttrain.data import json_lines
from posttrain.data.files import File, machine_cache, open_file
from posttrain.data.parquet_footer import row_group_ranges
from posttrain.data.ranged import CHUNK_BYTES, RangedFile
from posttrain.errors import DataError, PosttrainError, RowError

SUFFIXES = (".jsonl", ".parquet", ".arrow")

_UNDECODABLE = (pa.ArrowException, ValueError, MemoryError, RuntimeError)
"""What pyarrow raises on damaged bytes; MemoryError of lengths that the damage claims, RuntimeError of a Parquet footer
whose statistics do not add up."""

_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A part of a shard that is read at once."""

    rows: int
    bytes: int
    """In memory, about."""
    offset: int
    """Where its bytes begin in the file."""
    length: int
    """How many bytes of the file it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One indexed file."""

    file: File
    fingerprint: str
    """Depends on the contents, not on where or when the file was written."""
    blocks: tuple[Block, ...]

    @property
    def num_rows(self) -> int:
        return sum(block.rows for block in self.blocks)


def index(file: File) -> Shard:
    """Find the blocks of a file.

    Raises:
        DataError: the file is truncated, damaged, or not what its name says.
    """
    try:
        if file.uri.endswith(".parquet"):
            return _index_parquet(file)
        if file.uri.endswith(".arrow"):
            return _index_arrow(file)
        return _index_lines(file)
    except PosttrainError:
        raise  # of the store, which has its own name for it
    except (*_UNDECODABLE, EOFError) as error:
        kind = file.uri.rsplit(".", 1)[-1]
        raise DataError(
            f"{file.uri} is not a whole {kind} file: {str(error) or type(error).__name__}; write it again"
        ) from None
    except OSError as error:
        raise DataError(f"{file.uri} cannot be read: {error}") from None


class Reader:
    """Reads the blocks of one shard; keeps the file open."""

    def __init__(self, shard: Shard):
        self.shard = shard
        self._raw = open_file(shard.file, cache=machine_cache(), starts=_starts(shard))
        self._parquet: pq.ParquetFile | None = None
        self._arrow: pa.RecordBatchFileReader | None = None

    def read(self, block: int) -> "Records":
        """The records of a block; its bytes are not kept.

        Raises:
            DataError: the bytes are damaged (a page's checksum differs, a batch does not decode).
        """
        records, at = self._read(block), self.shard.blocks[block]
        if isinstance(self._raw, RangedFile) and at.length:
            self._raw.drop(at.offset, at.length)
        return records

    def _read(self, block: int) -> "Records":
        uri = self.shard.file.uri
        try:
            if uri.endswith(".parquet"):
                self._parquet = self._parquet or pq.ParquetFile(self._raw, page_checksum_verification=True)
                return _sound(self._parquet.read_row_group(block, use_threads=False))
            if uri.endswith(".arrow"):
                return pa.Table.from_batches([_sound(self._batch(block))])
        except PosttrainError:
            raise
        except (*_UNDECODABLE, OSError) as error:  # a page's checksum is an OSError
            raise DataError(f"{uri}, block {block}: its bytes are damaged: {error}; write the file again") from None
        at = self.shard.blocks[block]
        self._raw.seek(at.offset)
        return json_lines.split_lines(self._raw.read(at.length))

    def read_ahead(self, block: int) -> None:
        """Begin to fetch a block's bytes, where that takes time."""
        at = self.shard.blocks[block]
        if isinstance(self._raw, RangedFile) and at.length:
            self._raw.prefetch(at.offset, at.length)

    def close(self) -> None:
        """Close the file."""
        self._raw.close()

    def _batch(self, block: int) -> pa.RecordBatch:
        if self._arrow is None and _is_arrow_file(self._raw):
            self._arrow = pa.ipc.open_file(self._raw)
        if self._arrow is not None:
            return self._arrow.get_batch(block)
        self._raw.seek(0)
        schema = pa.ipc.read_schema(pa.PythonFile(self._raw, mode="r"))
        self._raw.seek(self.shard.blocks[block].offset)
        return pa.ipc.read_record_batch(pa.ipc.read_message(pa.PythonFile(self._raw, mode="r")), schema)


def _sound(values: Any, *, full: bool = True) -> Any:
    """A batch or table of pyarrow whose lengths and offsets lie within its buffers: to look at others may kill the
    process, and pyarrow decodes a damaged file without looking.

    Args:
        full: look at every offset and at UTF-8 too, before values are read.

    Raises:
        pa.ArrowInvalid, UnicodeDecodeError: they do not, or a column's name is no text.
    """
    values.validate(full=full)
    _decode_names(values.schema)
    return values


def _decode_names(fields: Any) -> None:
    """Look at the name of every field of a schema or a nested type, which pyarrow decodes late."""
    for field in fields:
        assert isinstance(field.name, str)
        nested = field.type
        _decode_names([nested.field(n) for n in range(nested.num_fields)])


Records = pa.Table | list[bytes]
"""The rows of a block, not yet Python objects."""


def take(records: Records, rows: Sequence[int]) -> list[dict[str, Any] | RowError]:
    """Some rows of a block as Python values; a row that is no record comes back as the error it is."""
    if isinstance(records, list):
        return json_lines.parse_lines([records[row] for row in rows])
    return records.take(pa.array(rows, pa.int64())).to_pylist()


def line_number(shard: Shard, block: int, row: int) -> int:
    """Line, from 1, of a row of a JSONL shard; reads the file up to it, so only for errors."""
    at = shard.blocks[block]
    with open_file(shard.file) as raw:
        return json_lines.line_number(_read_at(raw), json_lines.Lines(at.rows, at.offset, at.length), row)


def _starts(shard: Shard) -> list[int]:
    """Where ranged reads of a shard begin: at its blocks, and within a long one."""
    edges = {0}
    for block in shard.blocks:
        end = block.offset + block.length
        edges |= {*range(block.offset, end, CHUNK_BYTES), end}
    return sorted(edge for edge in edges if edge == 0 or edge < shard.file.size)


def _index_parquet(file: File) -> Shard:
    with open_file(file) as raw:
        raw.seek(max(0, file.size - 8))
        tail = raw.read(8)
        if len(tail) < 8 or tail[4:] != b"PAR1":
            raise DataError(f"{file.uri} is not a whole Parquet file: it ends without its footer; write it again")
        raw.seek(max(0, file.size - 8 - int.from_bytes(tail[:4], "little")))
        footer = raw.read()
        meta = pq.ParquetFile(raw).metadata
        ranges = row_group_ranges(footer)
        if len(ranges) != meta.num_row_groups:
            raise ValueError(
                f"its footer has {len(ranges)} row groups to one reader and {meta.num_row_groups} to another"
            )
        blocks = []
        for number, (first, length) in enumerate(ranges):
            group = meta.row_group(number)
            blocks.append(Block(rows=group.num_rows, bytes=group.total_byte_size, offset=first, length=length))
    return Shard(file=file, fingerprint=hashlib.sha256(footer).hexdigest(), blocks=tuple(b for b in blocks if b.rows))


def _index_arrow(file: File) -> Shard:
    """Arrow IPC, file or stream format; Hugging Face datasets write streams."""
    blocks, chain = [], hashlib.sha256()
    with open_file(file) as raw:
        if _is_arrow_file(raw):
            reader = pa.ipc.open_file(raw)
            batches = [_sound(reader.get_batch(i), full=False) for i in range(reader.num_record_batches)]
            blocks = [Block(rows=b.num_rows, bytes=b.nbytes, offset=0, length=0) for b in batches]
            chain.update(str(reader.schema).encode())
        else:
            stream = pa.PythonFile(raw, mode="r")
            schema = pa.ipc.read_schema(stream)
            chain.update(str(schema).encode())
            while (at := raw.tell()) < file.size - len(_END_OF_STREAM):
                message = pa.ipc.read_message(stream)
                if message.type != "record batch":
                    raise DataError(f"{file.uri}: holds a {message.type}; write it without dictionary columns")
                batch = _sound(pa.ipc.read_record_batch(message, schema), full=False)
                blocks.append(Block(rows=batch.num_rows, bytes=batch.nbytes, offset=at, length=raw.tell() - at))
            if raw.read() != _END_OF_STREAM:
                raise DataError(f"{file.uri} is not a whole arrow file: its stream has no end; write it again")
    chain.update(repr([(b.rows, b.bytes) for b in blocks]).encode())
    chain.update(_ends(file))
    return Shard(file=file, fingerprint=chain.hexdigest(), blocks=tuple(b for b in blocks if b.rows))


def _is_arrow_file(raw: Any) -> bool:
    raw.seek(0)
    magic = raw.read(6)
    raw.seek(0)
    return magic == b"ARROW1"


def _index_lines(file: File) -> Shard:
    with open_file(file) as raw:
        found = json_lines.cut_lines(_read_at(raw), file.size)
    blocks = [Block(rows=each.rows, bytes=each.length, offset=each.offset, length=each.length) for each in found]
    chain = hashlib.sha256(repr([(b.rows, b.bytes) for b in blocks]).encode())
    chain.update(_ends(file))
    return Shard(file=file, fingerprint=chain.hexdigest(), blocks=tuple(b for b in blocks if b.rows))


def _read_at(raw: Any) -> json_lines.ReadAt:
    """Reads at any place, from any thread."""
    if isinstance(raw, RangedFile):
        return raw.read_at
    return lambda offset, length: os.pread(raw.fileno(), length, offset)


def _ends(file: File, size: int = 65536) -> bytes:
    """The first and last bytes of a file."""
    with open_file(file) as raw:
        head = raw.read(size)
        raw.seek(max(0, file.size - size))
        return head + raw.read(size)
