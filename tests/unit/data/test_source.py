"""Files and functions become rows; what is no row is named by file and line."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain import storage
from posttrain.data.source import check_source, read_rows, stored_rows, write_rows
from posttrain.errors import ConfigError, DataError

ROWS = [{"prompt": "sort 21", "answer": "12"}, {"prompt": "ä\u2028", "answer": None}]
JSONL = '{"prompt": "sort 21", "answer": "12"}\n\n{"prompt": "ä\u2028", "answer": null}\r\n'.encode()


def rows_from_a_seed(seed):
    return ({"prompt": f"{seed}-{number}"} for number in range(2))


def no_rows(seed):
    return []


def not_rows(seed):
    return [{"prompt": "x"}, "y"]


def read(source, *, seed=0):
    return read_rows(source, key="data.prompts", seed=seed)


def parquet_bytes(rows):
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), buffer, compression="none", write_page_checksum=True)
    return buffer.getvalue().to_pybytes()


def test_jsonl_becomes_rows_in_order(root_uri):
    source = storage.join(root_uri, "rows.jsonl")
    storage.write_bytes(source, JSONL)
    assert read(source) == ROWS


def test_parquet_becomes_rows_in_order(root_uri):
    source = storage.join(root_uri, "rows.parquet")
    storage.write_bytes(source, parquet_bytes(ROWS))
    assert read(source) == ROWS


def test_a_function_is_called_with_the_seed():
    assert read(f"{__name__}:rows_from_a_seed", seed=7) == [{"prompt": "7-0"}, {"prompt": "7-1"}]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": ', "rows.jsonl:3: not JSON: "),
        (b'{"prompt": "\xff"}', "rows.jsonl:3: byte 12 is not UTF-8"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, problem):
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "x"}\n\n' + line + b"\n{}\n")
    with pytest.raises(DataError) as error:
        read(str(tmp_path / "rows.jsonl"))
    assert str(error.value).startswith(f"data.prompts: {tmp_path}/{problem}")


@pytest.mark.parametrize("line", [b"[1]", b'"text"', b"3", b"null"])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    (tmp_path / "rows.jsonl").write_bytes(b"{}\n" + line)
    with pytest.raises(DataError, match="row 1: expected a record, got"):
        read(str(tmp_path / "rows.jsonl"))


def test_what_a_function_returns_is_checked_too():
    with pytest.raises(DataError, match="not_rows, row 1: expected a record, got str"):
        read(f"{__name__}:not_rows")


def test_no_rows_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\n \n")
    (tmp_path / "rows.parquet").write_bytes(parquet_bytes(ROWS[:0]))
    for source in (tmp_path / "rows.jsonl", tmp_path / "rows.parquet", f"{__name__}:no_rows"):
        with pytest.raises(DataError, match=f"^data.prompts: {source} has no rows"):
            read(str(source))


def test_a_damaged_parquet_file_is_refused_by_name(tmp_path):
    whole, path = parquet_bytes([{"prompt": f"question {number}"} for number in range(100)]), tmp_path / "rows.parquet"
    place = whole.index(b"question 50")
    flipped = whole[:place] + b"Q" + whole[place + 1 :]
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:place] + whole[place + 9 :], flipped, b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"^data.prompts: {path} is not a whole Parquet file: "):
            read(str(path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(rows=st.lists(st.dictionaries(st.text(), JSON, max_size=3), min_size=1, max_size=4))
def test_any_record_survives_being_stored(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("stored") / "rows.parquet"
    write_rows(rows, path)
    assert stored_rows(path) == rows


def test_a_source_is_checked_without_being_read(root_uri):
    source = storage.join(root_uri, "rows.jsonl")
    storage.write_bytes(source, b"not JSON, and not looked at")
    check_source(source, key="data.prompts")
    check_source(f"{__name__}:rows_from_a_seed", key="data.prompts")


def test_a_source_that_does_not_exist_is_refused_with_the_place_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        check_source("nowhere.jsonl", key="data.prompts")
    assert str(error.value) == f"data.prompts: nowhere.jsonl does not exist (looked for {tmp_path / 'nowhere.jsonl'})"


def test_a_missing_object_on_s3_is_refused(s3_bucket):
    with pytest.raises(DataError, match=f"data.prompts: {s3_bucket}/rows.jsonl does not exist$"):
        check_source(f"{s3_bucket}/rows.jsonl", key="data.prompts")


def test_an_unknown_file_type_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(DataError, match=r"rows\.csv: known file types are \.jsonl, \.parquet"):
        check_source(str(tmp_path / "rows.csv"), key="data.prompts")


def test_a_missing_function_is_a_config_error():
    with pytest.raises(ConfigError, match=r"^data\.prompts: posttrain\.data\.sort_digits:promts"):
        check_source("posttrain.data.sort_digits:promts", key="data.prompts")


def test_a_row_that_json_cannot_hold_is_named(tmp_path):
    from datetime import date

    with pytest.raises(DataError, match=r"data\.rows, row 1: .*date is not JSON serializable"):
        write_rows([{"a": 1}, {"when": date(2026, 1, 1)}], tmp_path / "rows.parquet")
