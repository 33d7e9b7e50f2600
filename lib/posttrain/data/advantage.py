"""Rewards of one group become advantages."""

import math
import statistics
from collections.abc import Sequence

from posttrain.errors import RewardError


def group_advantages(rewards: Sequence[float], *, normalize_std: bool) -> list[float]:
    """Center rewards within one group.

    Args:
        rewards: [G], one per completion of the same prompt.
        normalize_std: divide by the group's standard deviation + 1e-6.

    Returns:
        [G]; all 0 when the rewards are equal: the group then teaches nothing.

    Raises:
        RewardError: a reward is NaN or infinite.

    Source: GRPO, arXiv:2402.03300, section 4.1.2; without the division Dr. GRPO, arXiv:2503.20783.
    """
    if not all(math.isfinite(reward) for reward in rewards):
        raise RewardError(f"rewards {list(rewards)} are not all finite")
    mean = statistics.fmean(rewards)
    scale = statistics.pstdev(rewards) + 1e-6 if normalize_std else 1.0
    return [(reward - mean) / scale for reward in rewards]
