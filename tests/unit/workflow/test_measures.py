"""The gate holds a trained model to what it started from."""

import pytest

from posttrain.errors import GateError
from posttrain.workflow.measures import check_gate, measured, perplexity

BEFORE, AFTER = {"loss": 1.0, "greedy_reward": 0.5}, {"loss": 1.2, "greedy_reward": 0.6, "margin": 3.0}


def gate(limits):
    check_gate({"before": BEFORE, "after": AFTER}, limits, before="before", after="after")


def test_a_measure_may_fall_by_what_the_gate_allows_and_no_more():
    gate({"loss": 0.21, "greedy_reward": 0.0})
    with pytest.raises(GateError, match=r"eval.gate: loss went from 1 to 1.2, worse by 0.2; allowed 0.1"):
        gate({"loss": 0.1})


def test_which_way_is_better_depends_on_the_measure():
    worse = {"before": AFTER, "after": BEFORE}
    with pytest.raises(GateError, match=r"greedy_reward went from 0.6 to 0.5"):
        check_gate(worse, {"loss": 0.0, "greedy_reward": 0.05}, before="before", after="after")


def test_no_number_is_worse_than_any():
    with pytest.raises(GateError, match="nan"):
        check_gate({"before": BEFORE, "after": {"loss": float("nan")}}, {"loss": 9.0}, before="before", after="after")


def test_only_what_all_models_have_is_compared():
    assert measured({"before": BEFORE, "after": AFTER}) == ["loss", "greedy_reward"]


def test_a_loss_beyond_all_floats_has_an_infinite_perplexity():
    assert perplexity(0.0) == 1.0 and perplexity(1e4) == float("inf")
