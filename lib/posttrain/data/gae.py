"""Rewards along a completion become an advantage a token: generalised advantage estimation, and rewards to go.

Plain functions of one completion's [C] numbers, float64, over the tokens that the policy wrote and no others.
"""

from collections.abc import Sequence

import numpy as np

from posttrain.data.advantage import EPSILON


def gae(rewards: np.ndarray, values: np.ndarray, *, gamma: float, lam: float) -> np.ndarray:
    """A_t = sum_k (gamma lam)^k d_(t+k) with d_t = r_t + gamma V_(t+1) - V_t, and V = 0 after the last token
    (arXiv:1506.02438, eq. 16).

    A_t + V_t is the return that the value head is fitted to. gamma = lam = 1 is rewards_to_go(r) - V.

    Args:
        rewards: [C] of each token.
        values: [C] what the critic expected before each token was chosen.

    Returns:
        [C] float64.
    """
    errors = rewards.astype(np.float64) - values
    errors[:-1] += gamma * values[1:]
    return _discounted_sums(errors, gamma * lam)


def rewards_to_go(rewards: np.ndarray) -> np.ndarray:
    """[C] float64: of each token the sum of its reward and all later ones; what came before it cannot change."""
    return _discounted_sums(rewards.astype(np.float64), 1.0)


def whitened(advantages: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Advantages of a step's completions with mean 0 and standard deviation 1 over all their tokens, each once."""
    together = np.concatenate(advantages)
    scale = together.std() + EPSILON
    return [(each - together.mean()) / scale for each in advantages]


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float | None:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 one that knows no more than the mean. None
    where all returns are equal, and there is nothing to explain."""
    spread = float(np.var(returns))
    return None if spread == 0 else 1.0 - float(np.var(returns - values)) / spread


def _discounted_sums(x: np.ndarray, factor: float) -> np.ndarray:
    found, following = np.empty_like(x), 0.0
    for t in range(len(x) - 1, -1, -1):
        found[t] = following = x[t] + factor * following
    return found
