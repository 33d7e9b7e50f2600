"""The learning rate at named steps, and what holds for every schedule."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.model.schedule import lr_scale

SCHEDULES = ("constant", "linear", "cosine", "wsd")


@pytest.mark.parametrize(
    ("step", "schedule", "expected"),
    [
        (0, "constant", 0.25),
        (3, "constant", 1.0),
        (9, "constant", 1.0),
        (4, "linear", 1.0),
        (7, "linear", 0.5),
        (4, "cosine", 1.0),
        (9, "cosine", 0.1),
        (7, "wsd", 1.0),
        (8, "wsd", 1.0),
        (9, "wsd", 1 - math.sqrt(0.5)),
    ],
)
def test_values_of_ten_steps_with_four_of_warm_up(step: int, schedule: str, expected: float):
    assert lr_scale(step, schedule=schedule, warmup_steps=4, num_steps=10) == pytest.approx(expected)


def test_half_of_the_cosine_lies_between_peak_and_floor():
    assert lr_scale(50, schedule="cosine", warmup_steps=0, num_steps=101) == pytest.approx(0.55)


@given(
    schedule=st.sampled_from(SCHEDULES),
    num_steps=st.integers(1, 300),
    warmup=st.floats(0, 1),
)
def test_it_rises_to_the_peak_and_never_again_after(schedule: str, num_steps: int, warmup: float):
    warmup_steps = int(warmup * (num_steps - 1))
    found = [
        lr_scale(step, schedule=schedule, warmup_steps=warmup_steps, num_steps=num_steps) for step in range(num_steps)
    ]
    assert found[:warmup_steps] == sorted(found[:warmup_steps])
    assert found[warmup_steps:] == sorted(found[warmup_steps:], reverse=True)
    assert max(found) == pytest.approx(1.0) and min(found) > 0


def test_an_unknown_schedule_is_our_mistake():
    with pytest.raises(AssertionError, match="unknown schedule 'sine'"):
        lr_scale(5, schedule="sine", warmup_steps=0, num_steps=10)
