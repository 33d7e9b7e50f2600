"""Draw number -> which source, and how far into it: weighted, with caps and schedules, as a pure function.

The draws come in windows of W. A window's choices depend on the seed, the parts and the
window's number; what earlier windows took from each source (the only history there is) is
a handful of integers that can be kept, or counted again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posttrain.data.order import uniforms
from posttrain.errors import DataError

WINDOW = 1024
"""Draws that are tokenised and packed together, at least."""

_MIX = 0x6D6978
"""Keeps the mixer's random numbers apart from those of the orders under the same seed."""


def window_draws(pack_tokens: int) -> int:
    """Draws of a window where packs are as long as this. Each window ends with a pack that is seldom full, so longer
    packs take more draws: fill is 99 % at any length (benchmarks/packing_fill.py), where 1024 draws would leave 2 % of
    packs of 32,768 empty."""
    return max(WINDOW, pack_tokens // 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One source's place in the mixture."""

    name: str
    num_rows: int
    weight: tuple[tuple[int, float], ...]
    """(draw, weight) pairs, draws ascending: linear in between, constant outside. Weights are relative shares
    of the draws that are left to the sources that are not used up."""
    max_draws: int | None = None
    """Used up after so many draws; None repeats the source for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """The draws of one window, in order."""

    first: int
    """Number of the first draw, window * W."""
    source: np.ndarray
    """[N] int64, index of the part; N < W where the mixture ends."""
    position: np.ndarray
    """[N] int64, how many draws of that part came before: its own draw number."""


class Mixture:
    """Weighted parts.

    Raises:
        DataError: no part, or no part has a positive weight at the start.
    """

    def __init__(self, parts: Sequence[Part], *, seed: int, window: int = WINDOW):
        if not parts:
            raise DataError("the mixture has no source")
        if not any(self._weight_at(part, 0) > 0 for part in parts):
            raise DataError("no source has a positive weight at draw 0; give one of them a weight above zero")
        self.parts, self.seed, self.window_size = list(parts), seed, window
        unlimited = np.iinfo(np.int64).max
        self.limits = np.array([unlimited if p.max_draws is None else p.max_draws for p in parts], np.int64)
        self._known = {0: np.zeros(len(parts), np.int64)}

    def window(self, index: int) -> Draws:
        """The draws of window `index`; fewer than W only where every source is used up, and none after that.

        Raises:
            DataError: sources are left, and all of them have weight 0.
        """
        counts = self.counts_before(index)
        source = self._choose(index, counts)
        position = np.empty_like(source)
        for part in range(len(self.parts)):
            mine = source == part
            position[mine] = counts[part] + np.arange(mine.sum())
        self._remember(index + 1, counts + np.bincount(source, minlength=len(self.parts)))
        return Draws(first=index * self.window_size, source=source, position=position)

    def counts_before(self, index: int) -> np.ndarray:
        """[parts] int64, draws of each part in the windows before `index`."""
        start = max(known for known in self._known if known <= index)
        counts = self._known[start]
        for window in range(start, index):
            counts = counts + np.bincount(self._choose(window, counts), minlength=len(self.parts))
        self._remember(index, counts)
        return counts

    def resume(self, index: int, counts: Sequence[int]) -> None:
        """Take the counts before a window from a checkpoint instead of counting again."""
        self._remember(index, np.array(counts, np.int64))

    def total_draws(self) -> int | None:
        """All draws there are; None when a source repeats for ever."""
        return None if any(part.max_draws is None for part in self.parts) else int(self.limits.sum())

    def _choose(self, index: int, counts: np.ndarray) -> np.ndarray:
        """[N] int64, the part of each draw of a window. A part that is used up gives its share to the others."""
        chance = uniforms(self.window_size, self.seed, _MIX, index)
        weights = np.array([self._weight_at(part, index * self.window_size) for part in self.parts])
        chosen, counts = [], counts.copy()
        while len(chance):
            shares = np.cumsum(np.where(counts < self.limits, weights, 0.0))
            if shares[-1] <= 0:
                if (counts < self.limits).any():
                    first, last = index * self.window_size, (index + 1) * self.window_size - 1
                    raise DataError(
                        f"in draws {first} to {last} every source that is not used up has weight 0; "
                        "give one of them a weight above zero there"
                    )
                break
            picks = np.searchsorted(shares / shares[-1], chance, side="right")
            upto = len(picks)
            for part in range(len(self.parts)):
                mine, left = np.flatnonzero(picks == part), self.limits[part] - counts[part]
                if len(mine) > left:
                    upto = min(upto, int(mine[left]))
            chosen.append(picks[:upto])
            counts += np.bincount(picks[:upto], minlength=len(self.parts))
            chance = chance[upto:]
        return np.concatenate(chosen) if chosen else np.empty(0, np.int64)

    @staticmethod
    def _weight_at(part: Part, n: int) -> float:
        draws, weights = zip(*part.weight, strict=True)
        return float(np.interp(n, draws, weights))

    def _remember(self, index: int, counts: np.ndarray) -> None:
        self._known[index] = counts
        if len(self._known) > 64:  # the beginning, and the latest windows
            self._known = {key: self._known[key] for key in [0, *sorted(self._known)[-32:]]}
