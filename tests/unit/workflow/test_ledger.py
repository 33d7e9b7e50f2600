"""The ledger counts every draw once and its digest tells two histories apart."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.sample import shift
from posttrain.data.types import Pack
from posttrain.workflow.ledger import Ledger


def one_pack(*ids: int, advantage: float = 1.0) -> Pack:
    sample = shift(ids, [1.0] * len(ids), advantages=[advantage] * len(ids))
    return Pack(samples=(sample,), num_units=1)


@pytest.mark.fault("F50", outcome="CONTINUE")
def test_every_draw_is_trained_or_dropped_with_its_reason():
    ledger = Ledger()
    assert [ledger.draw() for _ in range(3)] == [0, 1, 2]
    assert ledger.balance() == 3
    assert ledger.drop("reward_error") == 1
    ledger.commit([one_pack(1, 2, 3)], draws=[0, 2])
    assert ledger.balance() == 0
    assert ledger.state()["dropped"] == {"reward_error": 1}


def test_what_a_stream_hands_out_balances_between_steps():
    ledger = Ledger()
    for draws, dropped in (([0, 2], {"too_long": 1}), ([5], {"too_long": 2, "no_turn": 1}), ([6, 6], {})):
        dropped = ledger.dropped | dropped
        ledger.hand_out(len(draws), dropped)
        assert ledger.balance() == len(draws)
        ledger.commit([one_pack(1, 2)], draws=draws)
        assert ledger.balance() == 0
    assert ledger.state() | {"digest": ""} == {
        "digest": "",
        "drawn": 8,
        "trained": 5,
        "dropped": {"too_long": 2, "no_turn": 1},
        "open": {},
    }


def test_the_state_says_how_far_every_open_draw_is_and_a_restore_draws_them_again():
    ledger = Ledger()
    for _ in range(5):
        ledger.draw()
    ledger.move(0, "scored")
    ledger.move(2, "in_flight")
    ledger.move(4, "in_flight")
    ledger.drop("no_signal", 1)
    ledger.commit([one_pack(1, 2)], draws=[0])
    state = json.loads(json.dumps(ledger.state()))
    assert state["open"] == {"in_flight": [2, 4], "queued": [3]}
    assert (state["drawn"], state["trained"], state["dropped"]) == (5, 1, {"no_signal": 1})
    assert Ledger(state).draw() == 2


def test_a_stream_that_forgets_a_drop_is_noticed():
    ledger = Ledger()
    ledger.hand_out(1, {"too_long": 2})
    with pytest.raises(AssertionError, match="too_long"):
        ledger.hand_out(1, {"too_long": 1})


def test_a_commit_returns_the_line_of_its_batch():
    ledger = Ledger()
    ledger.hand_out(5, {"too_long": 3})
    line = ledger.commit([one_pack(1, 2)], draws=[9, 4, 3, 5, 12])
    assert line == {"digest": ledger.digest, "draws": [[3, 5], [9, 9], [12, 12]], "dropped": {"too_long": 3}}
    ledger.drop("too_long")
    assert line["dropped"] == {"too_long": 3}, "a line does not change when the ledger goes on"
    assert json.loads(json.dumps(line)) == line


@given(st.lists(st.integers(0, 30), min_size=1))
def test_the_ranges_of_a_line_name_every_draw_as_often_as_it_was_trained(draws):
    line = Ledger().commit([one_pack(1, 2)], draws=draws)
    assert sorted(n for first, last in line["draws"] for n in range(first, last + 1)) == sorted(draws)
    assert line["draws"] == sorted(line["draws"])


def test_a_restored_ledger_continues_the_chain():
    whole = Ledger()
    whole.commit([one_pack(1, 2)], draws=[0])
    restored = Ledger(whole.state())
    for ledger in (whole, restored):
        ledger.commit([one_pack(3, 4)], draws=[1])
    assert whole.state() == restored.state()


def test_the_digest_depends_on_content_and_order():
    def digest(*packs: Pack) -> str:
        ledger = Ledger()
        for each in packs:
            ledger.commit([each], draws=[0])
        return ledger.digest

    first, second = one_pack(1, 2, 3), one_pack(1, 2, 4)
    histories = [digest(first), digest(second), digest(first, second), digest(second, first)]
    assert len({*histories, digest(one_pack(1, 2, 3, advantage=0.5))}) == 5


def test_the_digest_depends_on_where_documents_end():
    def digest(*masks: list[float]) -> str:
        samples = tuple(shift([0] * (len(mask) + 1), [0.0, *mask]) for mask in masks)
        ledger = Ledger()
        ledger.commit([Pack(samples=samples, num_units=len(samples))], draws=range(len(samples)))
        return ledger.digest

    # Three and four tokens, or four and three: laid end to end, the columns of both are the same bytes.
    assert digest([0, 0, 1], [0, 0, 0, 1]) != digest([1, 0, 0, 0], [0, 0, 1])
