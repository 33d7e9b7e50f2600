"""Advantages along a completion against a plain double loop over the formula's sums."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.gae import explained_variance, gae, rewards_to_go, whitened

NUMBERS = st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=1, max_size=12)


def double_loop(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """arXiv:1506.02438, eq. 16, as it stands."""
    following = [*values[1:], 0.0]
    found = []
    for t in range(len(rewards)):
        total = 0.0
        for k in range(len(rewards) - t):
            error = rewards[t + k] + gamma * following[t + k] - values[t + k]
            total += (gamma * lam) ** k * error
        found.append(total)
    return found


@given(NUMBERS, st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_the_double_loop(numbers, gamma, lam):
    rewards, values = map(list, zip(*numbers, strict=True))
    found = gae(np.array(rewards), np.array(values), gamma=gamma, lam=lam)
    np.testing.assert_allclose(found, double_loop(rewards, values, gamma, lam), atol=1e-9)


@given(NUMBERS)
def test_without_discount_it_is_the_rewards_to_go_less_the_value(numbers):
    rewards, values = (np.array(column) for column in zip(*numbers, strict=True))
    np.testing.assert_allclose(gae(rewards, values, gamma=1, lam=1) + values, rewards_to_go(rewards), atol=1e-9)


def test_rewards_to_go_worked_out_by_hand():
    assert rewards_to_go(np.array([1.0, -2.0, 4.0], np.float32)).tolist() == [3.0, 2.0, 4.0]


def test_float32_inputs_are_not_written_to():
    rewards, values = np.ones(3, np.float32), np.ones(3, np.float32)
    gae(rewards, values, gamma=0.9, lam=0.9)
    assert rewards.tolist() == values.tolist() == [1, 1, 1]


def test_whitened_counts_every_token_once():
    long, short = whitened([np.array([1.0, 1.0, 1.0]), np.array([5.0])])  # mean 2, standard deviation sqrt(3)
    assert long == pytest.approx([-1 / 3**0.5] * 3, rel=1e-5) and short == pytest.approx([3**0.5], rel=1e-5)


def test_explained_variance_is_one_for_a_perfect_critic_zero_for_a_constant_and_unknown_for_equal_returns():
    returns = np.array([0.0, 1.0, 3.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(np.full(3, 7.0), returns) == pytest.approx(0.0)
    assert explained_variance(np.array([0.0, 0.5, 1.5]), returns) == pytest.approx(0.75)
    assert explained_variance(returns, np.ones(3)) is None
