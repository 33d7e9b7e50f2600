"""Advantages are rewards centred within their group."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from posttrain.data.advantage import group_advantages
from posttrain.errors import RewardError

REWARDS = st.lists(st.floats(-100, 100), min_size=2, max_size=16)


def test_centred_advantages_worked_out_by_hand():
    assert group_advantages([1, 0, 0, 1], normalize_std=False) == [0.5, -0.5, -0.5, 0.5]
    assert group_advantages([0.5, 2.0, 0.5], normalize_std=False) == [-0.5, 1.0, -0.5]


def test_normalised_advantages_worked_out_by_hand():
    found = group_advantages([1, 2, 3, 4], normalize_std=True)  # mean 2.5, population variance 1.25
    expected = [value / (math.sqrt(1.25) + 1e-6) for value in (-1.5, -0.5, 0.5, 1.5)]
    assert found == pytest.approx(expected, rel=1e-12)


@given(st.floats(-100, 100), st.integers(2, 16), st.booleans())
def test_equal_rewards_teach_nothing(reward, size, normalize_std):
    assert group_advantages([reward] * size, normalize_std=normalize_std) == pytest.approx([0.0] * size, abs=1e-7)


@given(REWARDS, st.booleans())
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order_of_the_rewards(rewards, normalize_std):
    found = group_advantages(rewards, normalize_std=normalize_std)
    assert len(found) == len(rewards)
    assert math.fsum(found) == pytest.approx(0, abs=1e-6)
    by_reward = [advantage for _, advantage in sorted(zip(rewards, found, strict=True))]
    assert by_reward == sorted(by_reward)


@given(REWARDS, st.floats(-100, 100))
def test_a_constant_added_to_all_rewards_changes_nothing(rewards, constant):
    shifted = group_advantages([reward + constant for reward in rewards], normalize_std=False)
    assert shifted == pytest.approx(group_advantages(rewards, normalize_std=False), abs=1e-9)


@given(REWARDS, st.floats(0.1, 100))
def test_normalised_advantages_do_not_depend_on_the_scale_of_the_reward(rewards, scale):
    assume(max(rewards) - min(rewards) > 1)
    scaled = group_advantages([reward * scale for reward in rewards], normalize_std=True)
    assert scaled == pytest.approx(group_advantages(rewards, normalize_std=True), abs=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalize_std", [True, False])
def test_a_reward_that_is_not_finite_is_refused(bad, normalize_std):
    with pytest.raises(RewardError, match="not all finite"):
        group_advantages([1.0, bad], normalize_std=normalize_std)
