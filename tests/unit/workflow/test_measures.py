"""The gate holds a trained model to what it started from."""

import pytest

from posttrain.errors import ConfigError, GateError
from posttrain.workflow.measures import (
    LABELS,
    check_gate,
    check_slices,
    gated,
    in_order,
    label_of,
    measured,
    pass_names,
    perplexity,
)

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


@pytest.mark.parametrize(
    ("name", "worse"), [("abs_error", 0.9), ("calibration_error", 0.9), ("pass@4", 0.1), ("accuracy", 0.1)]
)
def test_every_new_measure_is_judged_the_right_way(name: str, worse: float):
    models = {"before": {name: 0.5}, "after": {name: worse}}
    with pytest.raises(GateError, match=name):
        check_gate(models, {name: 0.1}, before="before", after="after")
    check_gate(models, {name: 0.1}, before="after", after="before")


def test_pass_at_k_stands_in_order_before_the_tokens():
    assert pass_names(12) == ["pass@1", "pass@2", "pass@4", "pass@8", "pass@12"]
    assert pass_names(1) == ["pass@1"] and pass_names(4)[-1] == "pass@4"
    shuffled = ["mean_tokens", "pass@12", "pass@2", "loss", "slices", "best_reward"]
    assert in_order(shuffled) == ["loss", "best_reward", "pass@2", "pass@12", "mean_tokens"]
    assert label_of("pass@1") == "solved by 1 sample"
    assert label_of("pass@4") == "solved by one of 4 samples" and label_of("loss") == LABELS["loss"]


SLICED = {
    "before": {"loss": 1.0, "slices": {"de": {"loss": 1.0, "accuracy": 0.5}, "en": {"loss": 1.0}}},
    "after": {"loss": 0.9, "slices": {"de": {"loss": 1.3, "accuracy": 0.5}, "en": {"loss": 0.5}}},
}


def gate_by_lang(limits):
    check_gate(SLICED, limits, before="before", after="after", slice_by="lang")


def test_a_slice_that_got_worse_fails_a_run_that_got_better():
    gate_by_lang({"loss": 0.0, "loss[lang=en]": 0.0, "loss[lang=de]": 0.31, "accuracy[lang=de]": 0.0})
    with pytest.raises(GateError, match=r"eval.gate: loss\[lang=de\] went from 1 to 1.3, worse by 0.3; allowed 0.1$"):
        gate_by_lang({"loss": 0.0, "loss[lang=en]": 0.0, "loss[lang=de]": 0.1})


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("loss[lang=fr]", "loss[lang=fr] was not measured of before, which has the slices de, en"),
        ("accuracy[lang=en]", "accuracy[lang=en] was not measured of before, which has the measures loss"),
        ("accuracy", "accuracy was not measured of before, which has the measures loss"),
        ("loss[site=de]", "loss[site=de] was not measured of before, which has the measures loss"),
    ],
)
def test_a_gate_on_what_was_not_measured_fails_with_what_there_is(name: str, there: str):
    with pytest.raises(GateError) as error:
        gate_by_lang({name: 9.0})
    assert str(error.value) == f"eval.gate: {there}"


def test_a_key_of_the_gate_names_a_measure_and_a_slice():
    assert gated("loss", "lang") == ("loss", None) and gated("loss[lang=de]", None) == ("loss[lang=de]", None)
    assert gated("pass@4[lang=a[b]=c.d]", "lang") == ("pass@4", "a[b]=c.d")
    assert gated("loss[lang]", "lang") == ("loss[lang]", None)


def test_a_slice_that_no_row_is_in_is_refused_with_those_that_there_are():
    check_slices(["loss", "loss[lang=de]"], "lang", ["de", "en", "de"])
    with pytest.raises(ConfigError, match=r"eval.gate.loss\[lang=fr\]: .* has lang = fr; there are de, en$"):
        check_slices(["loss", "loss[lang=fr]", "loss[lang=de]"], "lang", ["en", "de"])
