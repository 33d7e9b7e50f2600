"""Advantages are rewards against a baseline of their group, in the forms of the papers."""

import math
import statistics

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from posttrain.data.advantage import (
    advantages_of,
    batch_normalized,
    centered,
    leave_one_out,
    normalized,
    overlong_penalty,
)
from posttrain.errors import RewardError

NAMES = ("centered", "normalized", "leave_one_out", "batch_normalized")
FUNCTIONS = [advantages_of(name) for name in NAMES]
REWARDS = st.lists(st.floats(-100, 100), min_size=2, max_size=16)


def test_centered_worked_out_by_hand():
    assert centered([[1, 0, 0, 1], [0.5, 2.0, 0.5]]) == [[0.5, -0.5, -0.5, 0.5], [-0.5, 1.0, -0.5]]


def test_normalized_worked_out_by_hand():
    (found,) = normalized([[1, 2, 3, 4]])  # mean 2.5, population variance 1.25
    assert found == pytest.approx([value / (math.sqrt(1.25) + 1e-6) for value in (-1.5, -0.5, 0.5, 1.5)], rel=1e-12)


@given(st.lists(REWARDS, min_size=1, max_size=4))
def test_leave_one_out_is_the_reward_less_the_mean_of_the_others(groups):
    for group, found in zip(groups, leave_one_out(groups), strict=True):
        expected = [r - statistics.fmean(group[:i] + group[i + 1 :]) for i, r in enumerate(group)]
        assert found == pytest.approx(expected, abs=1e-9)


def test_batch_normalized_worked_out_by_hand():
    found = batch_normalized([[1, 0], [5, 5]])  # centred 0.5, -0.5, 0, 0: standard deviation 0.3536
    scale = math.sqrt(0.125) + 1e-6
    assert found == [pytest.approx([0.5 / scale, -0.5 / scale]), [0, 0]]


@pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)
@given(reward=st.floats(-100, 100), size=st.integers(2, 16))
def test_equal_rewards_teach_nothing(function, reward, size):
    assert function([[reward] * size])[0] == pytest.approx([0.0] * size, abs=1e-7)


@pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)
@given(rewards=REWARDS)
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order_of_the_rewards(function, rewards):
    (found,) = function([rewards])
    assert len(found) == len(rewards)
    assert math.fsum(found) == pytest.approx(0, abs=1e-6)
    by_reward = [advantage for _, advantage in sorted(zip(rewards, found, strict=True))]
    assert by_reward == sorted(by_reward)


@given(REWARDS, st.floats(-100, 100))
def test_a_constant_added_to_all_rewards_changes_nothing(rewards, constant):
    (shifted,) = centered([[reward + constant for reward in rewards]])
    assert shifted == pytest.approx(centered([rewards])[0], abs=1e-9)


@given(REWARDS, st.floats(0.1, 100))
def test_normalized_advantages_do_not_depend_on_the_scale_of_the_reward(rewards, scale):
    assume(max(rewards) - min(rewards) > 1)
    (scaled,) = normalized([[reward * scale for reward in rewards]])
    assert scaled == pytest.approx(normalized([rewards])[0], abs=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)
def test_a_reward_that_is_not_finite_is_refused(bad, function):
    with pytest.raises(RewardError, match="not all finite"):
        function([[1.0, bad]])


@pytest.mark.parametrize(("length", "expected"), [(0, 0), (60, 0), (70, -0.25), (80, -0.5), (100, -1.0)])
def test_the_last_tokens_cost_reward(length, expected):
    assert overlong_penalty(length, max_tokens=100, buffer=40) == pytest.approx(expected)
