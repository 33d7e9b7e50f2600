"""A completion gets a finite number, or an error that names it: a failure is never a reward of zero."""

import math

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
    assert text == f"{__name__}:raises_on_bad raised ZeroDivisionError: division by zero, on completion 1: 'two'"


def test_a_long_completion_is_shown_in_part():
    with pytest.raises(RewardError) as error:
        worker(has_parts).score({}, ["x" * 100_000])
    assert "KeyError: 'answer', on completion 0: 'xxx" in str(error.value)
    assert len(str(error.value)) < 500


def test_a_function_that_does_not_exist_is_refused_before_anything_is_scored():
    with pytest.raises(ConfigError, match=r"reward\.function"):
        RewardWorker("posttrain.data.sort_digits:rewrad")
