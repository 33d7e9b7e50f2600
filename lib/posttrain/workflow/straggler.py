"""Which rank holds the others up: seconds of every rank in, a ratio a step and, once, a name out."""

from collections import deque
from collections.abc import Sequence
from statistics import fmean

WINDOW = 20
"""Steps looked back on."""
SLOWER_BY = 0.10
"""Share by which the slowest must exceed the mean of the others for its step to count against it."""


def imbalance(loads: Sequence[float]) -> float:
    """The largest over the mean: 1 when all are equal, the number of ranks when one has everything."""
    return max(loads) / fmean(loads) if any(loads) else 1.0


class Stragglers:
    """Names a rank that is the slowest, at equal work, in more than half of the last WINDOW steps."""

    def __init__(self, hosts: Sequence[str]):
        """
        Args:
            hosts: of every rank.
        """
        self.hosts = list(hosts)
        self.slowest: deque[tuple[int, float] | None] = deque(maxlen=WINDOW)
        self.reported: set[int] = set()

    def seen(self, seconds: Sequence[float], work: Sequence[float]) -> str | None:
        """Count one step; return a report the first time that a rank deserves one.

        Args:
            seconds: forward and backward of every rank, without its waits for others.
            work: FLOPs that each was dealt; a rank with more of them is not slow for taking longer.
        """
        pace = {rank: s / w for rank, (s, w) in enumerate(zip(seconds, work, strict=True)) if w > 0}
        self.slowest.append(_slowest(pace))
        counts = [slow for slow in self.slowest if slow is not None]
        for rank in {rank for rank, _ in counts} - self.reported:
            excess = [by for slow, by in counts if slow == rank]
            if len(self.slowest) == WINDOW and len(excess) > WINDOW / 2:
                self.reported.add(rank)
                return (
                    f"policy rank {rank} on {self.hosts[rank]} is a straggler: the slowest in {len(excess)} of the "
                    f"last {WINDOW} steps, {fmean(excess):.0%} above the mean of the others at equal work. Look for "
                    "a throttled or shared device there; every rank waits for it"
                )
        return None


def _slowest(pace: dict[int, float]) -> tuple[int, float] | None:
    """The slowest rank and the share by which it exceeds the mean of the others, if that is enough to count."""
    if len(pace) < 2:
        return None
    rank = max(pace, key=lambda each: pace[each])
    others = fmean(value for other, value in pace.items() if other != rank)
    excess = pace[rank] / others - 1 if others else 0.0
    return (rank, excess) if excess > SLOWER_BY else None
