"""Token Parquet: tokenised Units on disk, and a stream's source of them.

A row is a Unit: its documents laid end to end. Page checksums are written, and verified when
read; a row group is a block that the stream's order can go to.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from posttrain.data.files import open_file
from posttrain.data.order import BlockOrder
from posttrain.data.source import Source
from posttrain.data.types import Sample, Unit
from posttrain.errors import RowError

GROUP_TOKENS = 512 * 1024
"""Tokens of a row group: about 6 MiB in memory, so that some fit in a group of the shuffle."""

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "target_ids": pa.list_(pa.int32()),
        "loss_mask": pa.list_(pa.float32()),
        "doc_lens": pa.list_(pa.int32()),
        "length": pa.int32(),
        "row_hash": pa.uint64(),
        "fields": pa.map_(pa.string(), pa.list_(pa.float32())),
    }
)
"""Of the unit: the columns of its documents end to end, tokens of each, tokens in all, the hash of its row (null in all
but the first unit of a row that was split), and every field's number of each document."""

TAUGHT = SCHEMA.append(pa.field("teacher_ids", pa.list_(pa.int32()))).append(
    pa.field("teacher_logprobs", pa.list_(pa.float32()))
)
"""With what a teacher said: of every token that carries loss its K likeliest, row after row."""

BESIDE = ("features", "labels")
"""Columns of what stands beside tokens (turn_numbers.py), token after token, where a recipe reads it."""

_Hashed = tuple[Unit, int | None]


def schema_with(beside: Iterable[str]) -> pa.Schema:
    """SCHEMA with some of the columns BESIDE."""
    schema = SCHEMA
    for name in beside:
        schema = schema.append(pa.field(name, pa.list_(pa.float32())))
    return schema


class UnitsFile:
    """A Parquet file of units that is being written; a context, closed at its end."""

    def __init__(self, path: Path, *, schema: pa.Schema = SCHEMA):
        """
        Args:
            schema: SCHEMA, TAUGHT for units that hold what a teacher said, or of schema_with().
        """
        self._schema = schema
        self._file = pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)
        self._group: list[_Hashed] = []
        self._tokens = 0

    def add(self, unit: Unit, row_hash: int | None) -> None:
        """Append a unit with the hash of the row it came from, or None."""
        self._group.append((unit, row_hash))
        self._tokens += sum(map(_size, unit))
        if self._tokens >= GROUP_TOKENS:
            self._write()

    def __enter__(self) -> "UnitsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._write()
        self._file.close()

    def _write(self) -> None:
        if self._group:
            self._file.write_table(_table(self._group, self._schema))
            self._group, self._tokens = [], 0


def write_units(units: Iterable[_Hashed], path: Path, *, schema: pa.Schema = SCHEMA) -> None:
    """One Parquet file of units, each with the hash of the row it came from, or None."""
    with UnitsFile(path, schema=schema) as file:
        for unit, row_hash in units:
            file.add(unit, row_hash)


def read_units(path: str | Path) -> list[Unit]:
    """All units of one file that write_units() wrote, in order."""
    return _units(pq.read_table(path, page_checksum_verification=True))


def block_units(source: Source, block: int) -> list[_Hashed]:
    """The units of one block of token Parquet, in order, each with its row's hash: what write_units() was given."""
    table: Any = source.block(block)
    return list(zip(_units(table), table["row_hash"].to_pylist(), strict=True))


def lengths_and_duplicates(source: Source) -> tuple[np.ndarray, int]:
    """[N] int32 tokens of every unit, and how many rows are exact copies of another; reads no tokens."""
    lengths, hashes = [np.empty(0, np.int32)], [np.empty(0, np.uint64)]
    for shard in source.shards:
        with open_file(shard.file) as raw:
            table = pq.read_table(raw, columns=["length", "row_hash"], page_checksum_verification=True)
        lengths.append(table["length"].to_numpy())
        hashes.append(table["row_hash"].drop_null().to_numpy())
    known = np.concatenate(hashes)
    return np.concatenate(lengths), len(known) - len(np.unique(known))


class TokenUnits:
    """Draw numbers of one source -> Units, from token Parquet."""

    def __init__(self, source: Source, *, seed: int, number: int):
        """
        Args:
            number: place in the mixture; the same file twice is shuffled differently.
        """
        self.source = source
        self.order = BlockOrder(source.block_rows, source.block_bytes, seed=seed, source=number)

    def units(self, positions: np.ndarray) -> list[list[Unit] | RowError]:
        """The unit of draws `positions` [N] of this source, each alone in a list.

        Raises:
            DataError: a page's bytes are damaged.
        """
        blocks, rows = self.order.locate(positions)
        found: list[list[Unit] | RowError] = [[]] * len(positions)
        for block in np.unique(blocks):
            here = np.flatnonzero(blocks == block)
            table: Any = self.source.block(int(block))  # Parquet: a pa.Table
            for place, unit in zip(here, _units(table.take(rows[here])), strict=True):
                found[place] = [unit]
        if len(positions):
            self.source.read_ahead(self.order.group_after(int(positions[-1])).tolist())
        return found


def _size(sample: Sample) -> int:
    """Tokens, and as many for what a teacher said as take the same memory: 8 bytes a number pair, 12 a token."""
    return len(sample) + (0 if sample.teacher_ids is None else sample.teacher_ids.size * 2 // 3)


def _table(group: list[_Hashed], schema: pa.Schema) -> pa.Table:
    columns: dict[str, list] = {
        name: [np.concatenate([getattr(sample, name).reshape(-1) for sample in unit]) for unit, _ in group]
        for name in ("input_ids", "target_ids", "loss_mask", "teacher_ids", "teacher_logprobs", *BESIDE)
        if name in schema.names
    }
    columns["doc_lens"] = [[len(sample) for sample in unit] for unit, _ in group]
    columns["length"] = [sum(map(len, unit)) for unit, _ in group]
    columns["row_hash"] = [row_hash for _, row_hash in group]
    columns["fields"] = [
        [(name, [sample.fields[name] for sample in unit]) for name in unit[0].fields] for unit, _ in group
    ]
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema})


def _units(table: pa.Table) -> list[Unit]:
    inputs, starts = _lists(table, "input_ids")
    targets, mask = _lists(table, "target_ids")[0], _lists(table, "loss_mask")[0]
    doc_lens, doc_starts = _lists(table, "doc_lens")
    fields: list[list[tuple[str, list[float]]]] = table["fields"].to_pylist()
    said = {name: _lists(table, name) for name in ("teacher_ids", "teacher_logprobs") if name in table.column_names}
    beside = {name: _lists(table, name) for name in BESIDE if name in table.column_names}
    units: list[Unit] = []
    for row in range(table.num_rows):
        ends = starts[row] + np.cumsum(doc_lens[doc_starts[row] : doc_starts[row + 1]])
        bounds = [int(starts[row]), *ends.tolist()]
        units.append(
            tuple(
                Sample(
                    input_ids=inputs[a:b],
                    target_ids=targets[a:b],
                    loss_mask=mask[a:b],
                    fields={name: values[document] for name, values in fields[row]},
                )
                for document, (a, b) in enumerate(pairwise(bounds))
            )
        )
        for name, (values, offsets) in beside.items():
            flat = values[offsets[row] : offsets[row + 1]].reshape(bounds[-1] - bounds[0], -1)
            columns = np.split(flat, np.cumsum(doc_lens[doc_starts[row] : doc_starts[row + 1] - 1]))
            units[-1] = tuple(replace(each, **{name: c}) for each, c in zip(units[-1], columns, strict=True))
        if said:
            here = {name: values[offsets[row] : offsets[row + 1]] for name, (values, offsets) in said.items()}
            units[-1] = _taught(units[-1], here)
    return units


def _taught(unit: Unit, said: dict[str, np.ndarray]) -> Unit:
    """The unit with its documents' [M, K] parts of flat columns over all of its tokens that carry loss."""
    counts = [int(np.count_nonzero(sample.loss_mask)) for sample in unit]
    parts = {name: np.split(flat.reshape(sum(counts), -1), np.cumsum(counts)[:-1]) for name, flat in said.items()}
    return tuple(replace(sample, **{name: parts[name][i] for name in parts}) for i, sample in enumerate(unit))


def _lists(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values of a list column, and where each row's begin. (combine_chunks() leaves no offset before row 0.)"""
    column = table[name].combine_chunks()
    return column.values.to_numpy(), column.offsets.to_numpy()
