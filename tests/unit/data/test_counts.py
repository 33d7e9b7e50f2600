"""What sources came to is counted whole, and the budget of bad rows holds over all of them."""

import pytest

from posttrain.data.counts import Counts, check_budget, check_not_empty
from posttrain.data.sample import shift
from posttrain.errors import DataError, RowError


def counted(*found, unknown_id=None):
    counts = Counts()
    for each in found:
        counts.add(each, unknown_id=unknown_id)
    return counts


SPLIT = [(shift([1, 2, 3], [0, 1, 1]),), (shift([3, 0], [1, 0.5]),)]
BAD = RowError("unknown_role", "x.jsonl:7: messages[1].role is 'bot'")


def test_rows_units_and_tokens_are_counted_by_hand():
    counts = counted(SPLIT, BAD, RowError("too_long", "x"), unknown_id=0)
    assert (counts.rows, counts.units, counts.tokens, counts.loss_tokens, counts.unknown_tokens) == (3, 2, 3, 2.5, 1)
    assert counts.dropped == {"unknown_role": 1, "too_long": 1}
    assert counts.examples == ["x.jsonl:7: messages[1].role is 'bot' (unknown_role)"]


def test_a_bad_row_that_is_drawn_again_is_quoted_once():
    again = counted(BAD, BAD)
    assert again.dropped == {"unknown_role": 2} and len(again.examples) == 1
    assert len(Counts.total([again.plain(), again.plain()]).examples) == 1


def test_parts_add_up_to_the_whole():
    parts = [counted(SPLIT, BAD), counted(BAD, BAD, BAD), counted()]
    assert Counts.total([part.plain() for part in parts]).plain() == counted(SPLIT, *[BAD] * 4).plain()


def test_a_budget_counts_all_sources_and_leaves_out_what_the_policy_drops():
    counts = [counted(BAD, RowError("too_long", "x")), counted(BAD, RowError("nothing_left", "x"))]
    check_budget(counts, max_bad_rows=2)
    with pytest.raises(
        DataError, match=r"2 bad rows \(2 unknown_role\), data\.max_bad_rows allows 1; .*: x\.jsonl:7: "
    ):
        check_budget(counts, max_bad_rows=1)


@pytest.mark.fault("F28", outcome="REFUSE")
def test_a_source_of_which_nothing_is_left_says_what_became_of_its_rows():
    empty = counted(BAD, *[RowError("too_long", "x")] * 2)
    with pytest.raises(
        DataError, match=r"data\.sources\[1\]: none of its 3 rows is left .*: 2 too_long, 1 unknown_role"
    ):
        check_not_empty(empty, key="data.sources[1]")
    check_not_empty(counted(SPLIT), key="x")
