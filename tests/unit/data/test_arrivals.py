"""A growing source: what is new by name or by contents, on disk and on S3."""

import json

import pytest

from posttrain import storage
from posttrain.data.arrivals import arrived, hashed_files
from posttrain.data.sort_digits_days import add_day
from posttrain.errors import DataError


def put(uri: str, name: str, text: str) -> str:
    storage.write_bytes(storage.join(uri, name), text.encode())
    return storage.join(uri, name)


def test_a_file_is_new_until_it_was_seen_and_again_when_its_contents_change(root_uri: str):
    one = put(root_uri, "one.jsonl", '{"text": "a"}\n')
    seen = hashed_files(root_uri, key="data.sources[0]")
    assert list(seen) == [one] and arrived(seen, {}) == [one] and arrived(seen, seen) == []
    two = put(root_uri, "two.jsonl", '{"text": "b"}\n')
    put(root_uri, "notes.txt", "no data")
    assert arrived(hashed_files(root_uri, key=""), seen) == [two]
    put(root_uri, "one.jsonl", '{"text": "c"}\n')  # as long as before
    assert arrived(hashed_files(root_uri, key=""), seen) == [one, two]


def test_a_file_that_is_written_again_with_the_same_bytes_is_not_new(root_uri: str):
    put(root_uri, "one.jsonl", '{"text": "a"}\n')
    seen = hashed_files(root_uri, key="")
    put(root_uri, "one.jsonl", '{"text": "a"}\n')
    assert arrived(hashed_files(root_uri, key=""), seen) == []


def test_a_source_that_names_nothing_is_refused_with_its_key(root_uri: str):
    with pytest.raises(DataError, match=r"data\.sources\[3\]: .*"):
        hashed_files(root_uri, key="data.sources[3]")


def test_days_differ_and_wrong_ones_are_wrong(tmp_path):
    one, two = add_day(tmp_path, count=50), add_day(tmp_path, count=50, wrong=1.0)
    assert [path.name for path in (one, two)] == ["day_0001.jsonl", "day_0002.jsonl"]
    right, wrong = ([json.loads(line) for line in path.read_text().splitlines()] for path in (one, two))
    answers = [[row["messages"][-1]["content"] for row in rows] for rows in (right, wrong)]
    assert all(list(answer) == sorted(answer) for answer in answers[0])
    assert all(list(answer) == sorted(answer, reverse=True) for answer in answers[1])
    assert right[0]["messages"][0] != wrong[0]["messages"][0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["day_0001.jsonl", "day_0002.jsonl"]
