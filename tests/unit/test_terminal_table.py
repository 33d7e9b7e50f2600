"""Tables on terminals of every width: what is in them is whole, and stands side by side where there is room."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from posttrain.terminal_table import print_table

ROWS = [("warmup", "120", "73,334,876", "< 1 ms"), ("grpo", "40", "81,701,462", "2.5 s")]


def printed(width: int, rows=ROWS, headings=("stage", "steps", "tokens a second", "of it sampling")) -> str:
    table = Table(box=SIMPLE_HEAD)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    print_table(Console(file=out, width=width), table)
    return out.getvalue()


@pytest.mark.parametrize("width", [36, 40, 60, 80, 200])
def test_nothing_is_cut_or_broken_at_any_width(width):
    text = printed(width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    for word in ("warmup", "steps", "tokens", "sampling", *(cell for row in ROWS for cell in row)):
        assert word in text, word


def test_a_row_is_a_line_where_there_is_room_and_a_column_is_a_line_where_there_is_none():
    assert any(line.split()[:2] == ["warmup", "120"] for line in printed(60).splitlines())
    narrow = [line.split() for line in printed(40).splitlines()]
    assert ["warmup"] in narrow and ["steps", "120"] in narrow and ["tokens", "a", "second", "73,334,876"] in narrow


def test_a_heading_takes_a_second_line_before_the_table_is_turned():
    text = printed(48)
    assert "tokens a second" not in text and "tokens a second" in printed(56)
    assert any(line.split()[:2] == ["warmup", "120"] for line in text.splitlines())


@given(
    rows=st.lists(st.tuples(*[st.integers(0, 10**12).map("{:,}".format)] * 5), min_size=1, max_size=4),
    width=st.integers(40, 120),
)
def test_every_number_of_any_table_is_there(rows, width):
    text = printed(width, rows, headings=("a", "b and c", "d", "e", "the longest one"))
    assert all(number in text for row in rows for number in row)
