"""Lines are found as splitting the whole file would find them, wherever blocks end."""

from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data import json_lines
from posttrain.data.json_lines import cut_lines, line_number, parse_lines, split_lines

FILES = st.lists(st.sampled_from([b"", b"\r", b"{}", b"x" * 9, b"x" * 40, b"{}\r", b" "]), max_size=30).flatmap(
    lambda lines: st.sampled_from([b"\n".join(lines), b"\n".join(lines) + b"\n"])
)


@given(FILES, st.integers(1, 60))
def test_blocks_hold_the_lines_of_the_file_in_order(data, size):
    def read_at(offset, length):
        return data[offset : offset + length]

    with patch.object(json_lines, "LINES_BYTES", size):
        blocks = cut_lines(read_at, len(data))
        assert b"".join(read_at(b.offset, b.length) for b in blocks) == data
        found = [split_lines(read_at(b.offset, b.length)) for b in blocks]
        assert [len(lines) for lines in found] == [b.rows for b in blocks]
        numbered = [(n, line) for n, line in enumerate(data.split(b"\n"), start=1) if line not in (b"", b"\r")]
        assert [line for lines in found for line in lines] == [line for _, line in numbered]
        places = [line_number(read_at, block, row) for block in blocks for row in range(block.rows)]
        assert places == [number for number, _ in numbered]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xff{}", "not_utf8"),
        (b'{"a": ', "not_json"),
        (b"[" * 100_000, "not_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not_json"),
        (b"[1]", "not_a_record"),
    ],
)
@pytest.mark.fault("F30", outcome="REFUSE")
def test_a_line_that_is_no_record_says_so(line, reason):
    assert parse_lines([line])[0].reason == reason


@pytest.mark.fault("F30", outcome="CONTINUE")
def test_a_byte_order_mark_is_no_part_of_a_record():
    assert parse_lines(['\ufeff{"a": 1}'.encode()]) == [{"a": 1}]
