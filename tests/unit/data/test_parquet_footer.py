"""The places of row groups are those that pyarrow says; any other bytes are a ValueError, and soon."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.parquet_footer import row_group_ranges

FLAT = pa.table(
    {"a": list(range(50)), "b": [None if n % 3 else "x" * n for n in range(50)], "c": [n % 2 == 0 for n in range(50)]}
)
KINDS = {"m": pa.list_(pa.struct({"role": pa.string(), "n": pa.float64()})), "k": pa.map_(pa.string(), pa.int64())}
MESSAGES = [[{"role": "user", "n": 1.5}] * (n % 4) for n in range(50)]
NESTED = pa.table({"m": MESSAGES, "k": [[("a", n)] for n in range(50)]}, schema=pa.schema(KINDS))


def footer_of(table: pa.Table, **options) -> tuple[bytes, pq.FileMetaData]:
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=20, **options)
    data = out.getvalue()
    return data[-8 - int.from_bytes(data[-8:-4], "little") :], pq.ParquetFile(io.BytesIO(data)).metadata


def expected(meta: pq.FileMetaData) -> list[tuple[int, int]]:
    groups = [meta.row_group(n) for n in range(meta.num_row_groups)]
    columns = [[group.column(c) for c in range(group.num_columns)] for group in groups]
    return [
        (min(c.dictionary_page_offset or c.data_page_offset for c in mine), sum(c.total_compressed_size for c in mine))
        for mine in columns
    ]


@pytest.mark.parametrize("table", [FLAT, NESTED], ids=["flat", "nested"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dictionary": False, "compression": "none"},
        {"write_page_index": True, "write_page_checksum": True, "data_page_version": "2.0"},
        {"write_statistics": False, "version": "1.0", "compression": "zstd"},
    ],
)
def test_the_places_are_those_that_pyarrow_says(table: pa.Table, options: dict):
    footer, meta = footer_of(table, **options)
    assert row_group_ranges(footer) == expected(meta) and len(expected(meta)) == 3


def test_a_footer_with_keys_of_its_own_and_sorting_columns():
    table = FLAT.replace_schema_metadata({"huggingface": "{}" * 200, "x": ""})
    footer, meta = footer_of(table, sorting_columns=[pq.SortingColumn(0, descending=True)])
    assert row_group_ranges(footer) == expected(meta)


def test_a_file_without_rows_has_no_row_groups_or_empty_ones():
    footer, meta = footer_of(FLAT.slice(0, 0))
    assert len(row_group_ranges(footer)) == meta.num_row_groups


@settings(deadline=None, max_examples=200)
@given(at=st.floats(0, 0.999), byte=st.integers(0, 255), keep=st.floats(0, 1), junk=st.binary(max_size=60))
def test_any_bytes_are_ranges_or_a_value_error(at: float, byte: int, keep: float, junk: bytes):
    footer, _ = footer_of(NESTED)
    changed = bytearray(footer)
    changed[int(at * len(changed))] = byte
    for data in (bytes(changed), bytes(changed[: int(keep * len(changed))]), junk):
        try:
            assert all(len(each) == 2 for each in row_group_ranges(data))
        except ValueError as error:
            assert str(error)


@pytest.mark.parametrize(
    "junk", [b"\x1c" * 10_000, b"\x19\xfc" * 5_000, b"\x1b\x05\xcc" * 3_000], ids=["structs", "lists", "maps"]
)
def test_what_nests_without_end_is_refused(junk: bytes):
    with pytest.raises(ValueError, match=r"nests more than|ends within"):
        row_group_ranges(junk)


def test_the_reader_of_files_asks_pyarrow_for_no_column_of_a_footer():
    source = Path(__file__).parents[3] / "lib" / "posttrain" / "data" / "shards.py"
    assert ".column(" not in source.read_text()
