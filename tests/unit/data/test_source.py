"""Files and functions become rows; what is no row is named by file and line."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import small_task
from posttrain import storage
from posttrain.data.json_lines import LINES_BYTES
from posttrain.data.source import (
    HELD_BYTES,
    OPEN_FILES,
    Source,
    as_files,
    check_source,
    read_rows,
    stored_rows,
    write_rows,
)
from posttrain.errors import ConfigError, DataError

RECORDS = [{"prompt": "sort 21", "answer": "12"}, {"prompt": "ä\u2028", "answer": None}]
ROWS = [
    {"messages": [{"role": "user", "content": "sort 21"}], "answer": "12"},
    {"messages": [{"role": "user", "content": "ä\u2028"}], "answer": None},
]
JSONL = '{"prompt": "sort 21", "answer": "12"}\n\n{"prompt": "ä\u2028", "answer": null}\r\n'.encode()


def records_from_a_seed(seed):
    return ({"prompt": f"{seed}-{number}"} for number in range(2))


def no_rows(seed):
    return []


def not_rows(seed):
    return [{"prompt": "x"}, "y"]


def read(source, *, seed=0, wanted="prompt"):
    return read_rows(source, key="data.prompts", seed=seed, wanted=wanted)


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
    storage.write_bytes(source, parquet_bytes(RECORDS))
    assert read(source) == ROWS


def test_a_function_is_called_with_the_seed():
    asked = [row["messages"][0]["content"] for row in read(f"{__name__}:records_from_a_seed", seed=7)]
    assert asked == ["7-0", "7-1"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": ', "rows.jsonl:3: not a JSON record: "),
        (b'{"prompt": "\xff"}', "rows.jsonl:3: byte 12 of the line is not UTF-8 (ff 22 7d)"),
        (b" ", "rows.jsonl:3: not a JSON record: "),
        (b'{"answer": "12"}', "rows.jsonl:3: "),
        (b'{"prompt": 12}', "rows.jsonl:3: "),
    ],
)
@pytest.mark.fault("F29", "F30", outcome="REFUSE")
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, problem):
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "x"}\n\n' + line + b"\n{}\n")
    with pytest.raises(DataError) as error:
        read(str(tmp_path / "rows.jsonl"))
    assert str(error.value).startswith(f"data.prompts: {tmp_path}/{problem}")


@pytest.mark.parametrize("line", [b"[1]", b'"text"', b"3", b"null"])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "x"}\n' + line)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: expected a JSON object, got"):
        read(str(tmp_path / "rows.jsonl"))


def test_what_a_function_returns_is_checked_too():
    with pytest.raises(DataError, match=r"not_rows, row 1: expected a record, got str"):
        read(f"{__name__}:not_rows")


@pytest.mark.fault("F28", outcome="REFUSE")
def test_no_rows_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\n\r\n")
    (tmp_path / "rows.parquet").write_bytes(parquet_bytes(RECORDS[:0]))
    for source in (tmp_path / "rows.jsonl", tmp_path / "rows.parquet", f"{__name__}:no_rows"):
        with pytest.raises(DataError, match=f"^data.prompts: {source} has no rows"):
            read(str(source))


@pytest.mark.fault("F29", outcome="REFUSE")
def test_a_damaged_parquet_file_is_refused_by_name(tmp_path):
    whole, path = parquet_bytes([{"prompt": f"question {number}"} for number in range(100)]), tmp_path / "rows.parquet"
    place = whole.index(b"question 50")
    flipped = whole[:place] + b"Q" + whole[place + 1 :]
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:place] + whole[place + 9 :], flipped, b""):
        path.write_bytes(damaged)
        with pytest.raises(
            DataError, match=f"^data.prompts: {path}(, block 0: its bytes are damaged| is not a whole Parquet file): "
        ):
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
    check_source(f"{__name__}:records_from_a_seed", key="data.prompts")


def test_a_source_that_does_not_exist_is_refused_with_the_place_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^data\.prompts: .*nowhere\.jsonl") as error:
        check_source("nowhere.jsonl", key="data.prompts")
    assert f"(looked for {tmp_path / 'nowhere.jsonl'})" in str(error.value)


def test_several_files_are_one_source_in_the_order_given_and_each_is_checked(tmp_path):
    paths = []
    for name in ("b", "a"):
        paths.append(str(tmp_path / f"{name}.jsonl"))
        Path(paths[-1]).write_text(json.dumps({"text": name}) + "\n")
    check_source(paths, key="data.sources[0]")
    source = as_files(paths, key="data.sources[0]", seed=0, uri=str(tmp_path / "unused"))
    assert [record for _, _, record in source.in_order()] == [{"text": "b"}, {"text": "a"}]
    again = Source.indexed(json.loads(json.dumps(source.plain_index())))
    assert again.fingerprint == source.fingerprint and again.num_rows == 2
    with pytest.raises(DataError, match=r"data\.sources\[0\]: .*gone\.jsonl"):
        check_source([*paths, str(tmp_path / "gone.jsonl")], key="data.sources[0]")


def test_a_missing_object_on_s3_is_refused(s3_bucket):
    with pytest.raises(DataError, match=rf"^data\.prompts: {s3_bucket}/rows\.jsonl"):
        check_source(f"{s3_bucket}/rows.jsonl", key="data.prompts")


def test_an_unknown_file_type_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"rows\.csv.*\.jsonl.*\.parquet.*\.arrow"):
        check_source(str(tmp_path / "rows.csv"), key="data.prompts")


def test_a_missing_function_is_a_config_error():
    with pytest.raises(ConfigError, match=r"^data\.prompts: posttrain\.data\.sort_digits:promts"):
        check_source("posttrain.data.sort_digits:promts", key="data.prompts")


def test_a_row_that_json_cannot_hold_is_named(tmp_path):
    from datetime import date

    with pytest.raises(DataError, match=r"data\.rows, row 1: .*date is not JSON serializable"):
        write_rows([{"a": 1}, {"when": date(2026, 1, 1)}], tmp_path / "rows.parquet")


def arrow_stream(records, path):
    """As Hugging Face datasets write their files: a stream of record batches."""
    table = pa.Table.from_pylist(records)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def arrow_file(records, path):
    table = pa.Table.from_pylist(records)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def parquet(records, path):
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=7, write_page_checksum=True)


def jsonl(records, path):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


WRITERS = {"rows.jsonl": jsonl, "rows.parquet": parquet, "rows.arrow": arrow_file, "stream.arrow": arrow_stream}
MANY = [{"prompt": f"question {n}", "answer": n} for n in range(40)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_type_is_read_at_any_place(tmp_path, name):
    WRITERS[name](MANY, tmp_path / name)
    source = Source(str(tmp_path / name), key="data.prompts")
    blocks = np.repeat(np.arange(len(source.block_rows)), source.block_rows)
    rows = np.concatenate([np.arange(count) for count in source.block_rows])
    assert source.num_rows == len(MANY) == len(rows)
    order = np.random.default_rng(0).permutation(len(MANY))
    assert source.records(blocks[order], rows[order]) == [MANY[place] for place in order]


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_type_is_read_from_s3(tmp_path, s3_bucket, name):
    WRITERS[name](MANY, tmp_path / name)
    storage.write_bytes(f"{s3_bucket}/data/{name}", (tmp_path / name).read_bytes())
    here, there = (Source(uri, key="data.prompts") for uri in (str(tmp_path), f"{s3_bucket}/data"))
    assert [record for _, _, record in there.in_order()] == MANY
    assert here.fingerprint == there.fingerprint


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.fault("F29", outcome="REFUSE")
def test_a_file_cut_short_is_refused_by_name(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](MANY, path)
    path.write_bytes(path.read_bytes()[:-70])
    with pytest.raises(DataError, match=rf"^data\.prompts: {path}"):
        read(str(path))


def test_the_fingerprint_follows_the_contents(tmp_path):
    prints = set()
    for number, records in enumerate([MANY, MANY[::-1], MANY[:-1]]):
        for name, write in WRITERS.items():
            path = tmp_path / str(number) / name
            path.parent.mkdir(exist_ok=True)
            write(records, path)
            prints.add(Source(str(path), key="x").fingerprint)
            assert Source(str(path), key="y").fingerprint in prints
    assert len(prints) == 3 * len(WRITERS)


def test_a_folder_is_the_rows_of_its_files_in_the_order_of_their_names(tmp_path):
    jsonl(MANY[20:], tmp_path / "b.jsonl")
    parquet(MANY[:20], tmp_path / "a.parquet")
    assert [record for _, _, record in Source(str(tmp_path), key="x").in_order()] == MANY
    globbed = Source(str(tmp_path / "*.parquet"), key="x")
    assert [record for _, _, record in globbed.in_order()] == MANY[:20]


def test_lines_are_cut_into_blocks_without_loss_whatever_their_length(tmp_path):
    records = [{"prompt": "x" * length} for length in (10, 3 * LINES_BYTES, 5, LINES_BYTES, 7)]
    jsonl(records, tmp_path / "rows.jsonl")
    source = Source(str(tmp_path / "rows.jsonl"), key="x")
    assert len(source.block_rows) > 1
    assert [record for _, _, record in source.in_order()] == records
    assert source.where(len(source.block_rows) - 1, int(source.block_rows[-1]) - 1).endswith("rows.jsonl:5")


def test_a_dataset_saved_by_hugging_face_is_read_and_its_splits_must_be_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(MANY)
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "train" / "cache-1.arrow").write_bytes(b"not data")
    found = Source(str(tmp_path / "saved" / "train"), key="x")
    assert [record for _, _, record in found.in_order()] == MANY
    with pytest.raises(DataError, match=r"holds the splits train; name one of them: .*/saved/train"):
        Source(str(tmp_path / "saved"), key="x")


def test_a_source_keeps_no_more_blocks_than_its_bound(tmp_path):
    big = [{"prompt": "x" * (HELD_BYTES // 8)} for _ in range(20)]
    jsonl(big, tmp_path / "rows.jsonl")
    source = Source(str(tmp_path / "rows.jsonl"), key="x")
    for _ in source.in_order():
        assert source.block_bytes[list(source._held)].sum() <= HELD_BYTES


def test_a_source_of_many_files_keeps_few_of_them_open(tmp_path):
    for number in range(2 * OPEN_FILES):
        jsonl([{"prompt": str(number)}], tmp_path / f"{number:03}.jsonl")
    source = Source(str(tmp_path), key="x")
    for _ in range(2):
        found = [record["prompt"] for _, _, record in source.in_order()]
        assert found == [str(number) for number in range(2 * OPEN_FILES)]
    assert len(source._readers) == OPEN_FILES


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    jsonl(MANY, tmp_path / "rows.jsonl")
    assert Source("~/rows.jsonl", key="x").num_rows == len(MANY)


def test_an_index_kept_as_json_opens_the_same_source_without_looking_at_the_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name}{n}"}}\n' for n in range(9)))
    made = Source(str(tmp_path), key="data.sources[0]")
    kept = json.loads(json.dumps(made.plain_index()))
    again = Source.indexed(kept)
    assert (again.fingerprint, again.num_rows, again.key) == (made.fingerprint, 18, "data.sources[0]")
    assert list(again.in_order()) == list(made.in_order())
    (tmp_path / "b.jsonl").write_text("{}\n")
    changed = Source.indexed(kept)
    with pytest.raises(DataError, match=r"data\.sources\[0\]: .*b\.jsonl: changed since it was indexed"):
        list(changed.in_order())


def test_blocks_in_any_order_are_fetched_from_s3_without_a_byte_too_many(s3_bucket, proxy):
    lines = "".join(f'{{"text": "{n:05d} {"x" * 5000}"}}\n' for n in range(2000)).encode()
    storage.write_bytes(f"{s3_bucket}/data.jsonl", lines)
    source = Source(f"{s3_bucket}/data.jsonl", key="x")
    proxy.reset()
    for block in (3, 0, 2, 1, 4):
        source.read_ahead([block])
        (first,) = source.records(np.array([block]), np.array([0]))
        assert isinstance(first, dict)
    asked = [tuple(map(int, get.range[6:].split("-"))) for get in proxy.gets]
    assert sorted(asked) == [(b.offset, b.offset + b.length - 1) for b in source.shards[0].blocks] and len(asked) == 5


def test_a_later_epoch_is_read_from_the_cache_of_the_machine(s3_bucket, proxy, tmp_path, monkeypatch):
    lines = "".join(f'{{"text": "{n:05d} {"x" * 5000}"}}\n' for n in range(1000)).encode()
    storage.write_bytes(f"{s3_bucket}/data.jsonl", lines)
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    kept = Source(f"{s3_bucket}/data.jsonl", key="x").plain_index()
    first = [record for _, _, record in Source.indexed(kept).in_order()]
    proxy.reset()
    assert [record for _, _, record in Source.indexed(kept).in_order()] == first and len(first) == 1000
    assert proxy.gets == []
    monkeypatch.setenv("POSTTRAIN_CACHE_GIB", "much")
    with pytest.raises(DataError, match="POSTTRAIN_CACHE_GIB is 'much'"):
        list(Source.indexed(kept).in_order())


def test_rows_of_a_function_become_a_file_once(tmp_path):
    uri = str(tmp_path / "rows")
    made = as_files("small_task:demonstrations", key="data.sources[0]", seed=3, uri=uri)
    assert [record for _, _, record in made.in_order()] == small_task.demonstrations(3)
    again = as_files("small_task:demonstrations", key="data.sources[0]", seed=4, uri=uri)
    assert again.fingerprint == made.fingerprint, "a repeated step keeps what is published"
