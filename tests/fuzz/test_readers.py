"""Any bytes for a data file: a DataError that names the file, or records; never another error, never a hang."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import fuzzed
from posttrain.data.row_reader import RowReader
from posttrain.data.source import Source
from posttrain.errors import DataError, RowError

ROWS = [{"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "4"}]} for n in range(40)]
WHERE = "data.sources[0]"


def sound(folder: Path) -> dict[str, bytes]:
    """The same rows in every file type."""
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, folder / "a.parquet", row_group_size=10, write_page_checksum=True)
    with pa.OSFile(str(folder / "b.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    with pa.OSFile(str(folder / "c.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return sound(tmp_path_factory.mktemp("sound"))


def read(folder: Path, name: str, data: bytes) -> list[Any] | None:
    """All records, each read as a row or named for what is wrong; None where the file was refused."""
    path = folder / name
    path.write_bytes(data)
    try:
        source = Source(str(path), key=WHERE)
        records = [record for _, _, record in source.in_order()]
        assert len(records) == source.num_rows
    except DataError as error:
        assert WHERE in str(error) and name in str(error)
        return None
    reader = RowReader(wanted="conversation")
    for record in records:
        try:
            reader(record)
        except RowError as error:
            assert error.reason and str(error)
    return records


@fuzzed
@given(data=st.binary(max_size=200), name=st.sampled_from(["x.parquet", "x.arrow", "x.jsonl"]))
@pytest.mark.fault("F29", "F30", outcome="REFUSE")
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str):
    read(tmp_path_factory.mktemp("any"), name, data)


@fuzzed
@given(
    name=st.sampled_from(["a.parquet", "b.arrow", "c.arrow", "d.jsonl"]), at=st.floats(0, 1), byte=st.integers(0, 255)
)
@pytest.mark.fault("F29", outcome="REFUSE")
def test_a_sound_file_with_one_byte_changed(
    files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, name: str, at: float, byte: int
):
    data = bytearray(files[name])
    data[min(int(at * len(data)), len(data) - 1)] = byte
    read(tmp_path_factory.mktemp("changed"), name, bytes(data))


@fuzzed
@given(name=st.sampled_from(["a.parquet", "b.arrow", "c.arrow"]), keep=st.floats(0, 1), insert=st.binary(max_size=16))
@pytest.mark.fault("F29", outcome="REFUSE")
def test_a_sound_file_that_is_cut_or_torn_apart(
    files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, name: str, keep: float, insert: bytes
):
    data = files[name]
    cut = int(keep * len(data))
    torn = data[:cut] + insert + data[cut:] if insert else data[:cut]
    found = read(tmp_path_factory.mktemp("torn"), name, torn)
    assert insert or cut == len(data) or found is None, "a file that is cut is refused"


@pytest.mark.fault("F29", outcome="REFUSE")
@pytest.mark.parametrize("file", sorted((Path(__file__).parent / "found").iterdir()), ids=lambda file: file.name)
def test_what_was_found_once_is_refused_for_ever(tmp_path: Path, file: Path):
    assert read(tmp_path, file.name, file.read_bytes()) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@fuzzed
@given(records=st.lists(st.dictionaries(st.text(max_size=8), json_values, max_size=4), min_size=1, max_size=5))
def test_any_json_record_comes_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, records: list[dict]):
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    assert read(tmp_path_factory.mktemp("lines"), "x.jsonl", data) == records


@fuzzed
@given(
    name=st.sampled_from(["dataset_dict.json", "state.json"]),
    content=st.binary(max_size=40) | json_values.map(lambda v: json.dumps(v).encode()),
)
def test_any_description_of_a_saved_dataset(tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes):
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "d.jsonl").write_text(json.dumps(ROWS[0]))
    (folder / name).write_bytes(content)
    try:
        assert Source(str(folder), key=WHERE).num_rows == 1
    except DataError as error:
        assert str(error)
