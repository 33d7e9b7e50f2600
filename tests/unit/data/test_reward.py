"""A completion gets a finite number, or an error that names it: a failure is never a reward of zero."""

import inspect
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.data.reward import RewardWorker
from posttrain.errors import ConfigError, RewardError

VALUES = {
    "nan": math.nan,
    "none": None,
    "infinite": -math.inf,
    "text": "1.0",
    "tensor": torch.tensor(1.0),
    "complex": 1j,
    "list": [1.0],
    "a bad part": {"format": 1.0, "answer": math.nan},
    "a missing part": {"format": 1.0, "answer": None},
    "no parts": {},
}


def returns_what_the_row_says(row, completion):
    return row["value"] if completion == "bad" else 0.5


def raises_on_bad(row, completion):
    return 1 / (len(completion) - 3)


def has_parts(row, completion):
    return {"length": len(completion), "answer": completion == row["answer"]}


def returns_a_bool(row, completion):
    return completion == row["answer"]


def returns_numpy(row, completion):
    return np.float32(0.25)


def worker(function):
    return RewardWorker(f"{__name__}:{function.__name__}")


def test_every_completion_gets_its_reward_in_order():
    scored = RewardWorker("posttrain.data.sort_digits:reward").score({"answer": "13"}, ["31", "13", "13 "])
    assert [value for value, _ in scored] == [0.0, 1.0, 0.0]


def test_the_parts_of_a_reward_are_kept_and_sum_to_it():
    assert worker(has_parts).score({"answer": "13"}, ["13", "134"]) == [
        (3.0, {"length": 2.0, "answer": 1.0}),
        (3.0, {"length": 3.0, "answer": 0.0}),
    ]


def test_a_bool_and_a_numpy_number_are_numbers():
    assert worker(returns_a_bool).score({"answer": "1"}, ["1", "2"]) == [(1.0, {"reward": 1.0}), (0.0, {"reward": 0.0})]
    ((value, parts),) = worker(returns_numpy).score({}, ["x"])
    assert (value, type(value), type(parts["reward"])) == (0.25, float, float)


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_what_is_no_finite_number_is_an_error_that_names_the_completion(value):
    with pytest.raises(RewardError, match=rf"{__name__}:returns_what_the_row_says, completion 1: "):
        worker(returns_what_the_row_says).score({"value": value}, ["good", "bad", "good"])


def test_a_bad_part_is_named():
    with pytest.raises(RewardError, match=r"completion 0: answer is nan, not a finite number"):
        worker(returns_what_the_row_says).score({"value": VALUES["a bad part"]}, ["bad"])


def test_a_function_that_raises_is_an_error_that_shows_the_completion():
    with pytest.raises(RewardError) as error:
        worker(raises_on_bad).score({}, ["four", "two"])
    text = str(error.value)
    line = inspect.getsourcelines(raises_on_bad)[1] + 1
    raised = f"raised ZeroDivisionError: division by zero in {Path(__file__).name}, line {line}"
    assert text == f"{__name__}:raises_on_bad {raised}, on completion 1: 'two'"


def test_a_long_completion_is_shown_in_part():
    with pytest.raises(RewardError) as error:
        worker(has_parts).score({}, ["x" * 100_000])
    assert re.search(r"KeyError: 'answer' in test_reward.py, line \d+, on completion 0: 'xxx", str(error.value))
    assert len(str(error.value)) < 500


def half(row, completion):
    return 0.5


def per_group(row, completions):
    return row["value"] if "value" in row else [float(len(each)) for each in completions]


def test_a_weighted_sum_keeps_the_parts_as_they_were():
    paths = {f"{__name__}:half": 2.0, f"{__name__}:has_parts": 0.1, f"{__name__}:returns_a_bool": -1.0}
    assert RewardWorker(paths).score({"answer": "13"}, ["13"]) == [
        (
            2.0 * 0.5 + 0.1 * 3.0 - 1.0,
            {"half": 0.5, "has_parts_length": 2.0, "has_parts_answer": 1.0, "returns_a_bool": 1.0},
        )
    ]


def test_functions_of_one_name_are_told_apart_by_their_paths():
    ours = f"{__name__}:half"
    ((value, parts),) = RewardWorker({ours: 1.0, "bad_rewards:half": 1.0}).score({}, ["x"])
    assert (value, parts) == (1.5, {ours: 0.5, "bad_rewards:half": 1.0})


def test_a_function_of_completions_gets_the_group_at_once():
    assert worker(per_group).score({}, ["a", "bb"]) == [(1.0, {"reward": 1.0}), (2.0, {"reward": 2.0})]


@pytest.mark.parametrize("value", [[1.0], [1.0, 2.0, 3.0], 1.0, None, "ab", {"a": 1, "b": 2}], ids=str)
@pytest.mark.fault("F47", outcome="CONTINUE")
def test_a_group_with_another_number_of_rewards_is_an_error(value):
    with pytest.raises(RewardError, match=rf"{__name__}:per_group returned .*, not a value for each of 2; asked 'q'"):
        worker(per_group).score({"value": value, "messages": [{"content": "q"}]}, ["a", "bb"])


def test_one_bad_value_of_a_group_is_named():
    with pytest.raises(RewardError, match=r"per_group, completion 1: reward is nan, not a finite number"):
        worker(per_group).score({"value": [1.0, math.nan]}, ["a", "bb"])


def test_a_function_that_does_not_exist_is_refused_before_anything_is_scored():
    with pytest.raises(ConfigError, match=r"reward\.function"):
        RewardWorker("posttrain.data.sort_digits:rewrad")
