"""Rewards become advantages: small functions from the groups of one step to one number a completion."""

import math
import statistics
from collections.abc import Callable, Sequence

from posttrain.errors import RewardError

Groups = Sequence[Sequence[float]]
"""Rewards of the completions of each prompt of a step."""
Advantages = Callable[[Groups], list[list[float]]]

EPSILON = 1e-6
"""Added to a standard deviation, so that equal rewards give 0 and not 0/0."""


def centered(groups: Groups) -> list[list[float]]:
    """r - mean of its group (Dr. GRPO, arXiv:2503.20783)."""
    return [[reward - statistics.fmean(group) for reward in group] for group in _finite(groups)]


def normalized(groups: Groups) -> list[list[float]]:
    """(r - mean) / standard deviation of its group (GRPO, arXiv:2402.03300, section 4.1.2)."""
    return [
        [advantage / (statistics.pstdev(group) + EPSILON) for advantage in row]
        for group, row in zip(groups, centered(groups), strict=True)
    ]


def leave_one_out(groups: Groups) -> list[list[float]]:
    """r - mean of the others of its group: an unbiased baseline (RLOO, arXiv:2402.14740, eq. 7)."""
    return [
        [a * len(group) / (len(group) - 1) for a in row] for group, row in zip(groups, centered(groups), strict=True)
    ]


def batch_normalized(groups: Groups) -> list[list[float]]:
    """r - mean of its group, over the standard deviation of the whole step (REINFORCE++-baseline, arXiv:2501.03262)."""
    rows = centered(groups)
    scale = statistics.pstdev([advantage for row in rows for advantage in row]) + EPSILON
    return [[advantage / scale for advantage in row] for row in rows]


def uncentered(groups: Groups) -> list[list[float]]:
    """The rewards as they are: what a critic is the baseline of (data/gae.py)."""
    return [list(group) for group in _finite(groups)]


def ignored(groups: Groups) -> list[list[float]]:
    """0 whatever the reward: a teacher says what each token is worth (workflow/credit.py)."""
    return [[0.0] * len(group) for group in _finite(groups)]


def overlong_penalty(length: int, *, max_tokens: int, buffer: int) -> float:
    """0 up to max_tokens - buffer tokens, then down in a line to -1 at max_tokens (DAPO, arXiv:2503.14476, eq. 13)."""
    return -max(0.0, length - (max_tokens - buffer)) / buffer


def advantages_of(name: str) -> Advantages:
    """The function that the config's `method.advantage` names."""
    match name:
        case "centered":
            return centered
        case "normalized":
            return normalized
        case "leave_one_out":
            return leave_one_out
        case "batch_normalized":
            return batch_normalized
        case "gae":
            return uncentered
        case "teacher":
            return ignored
    raise AssertionError(f"method.advantage {name!r} is none that is defined")


def _finite(groups: Groups) -> Groups:
    """
    Raises:
        RewardError: a reward is NaN or infinite.
    """
    for group in groups:
        if not all(math.isfinite(reward) for reward in group):
            raise RewardError(f"rewards {list(group)} are not all finite")
    return groups
