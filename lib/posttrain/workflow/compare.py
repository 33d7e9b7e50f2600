"""Is one model better than another on the same rows? Scores of both become a gain, its interval, and yes or no."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from posttrain.errors import DataError

MIN_ROWS = 20
"""Of fewer rows the percentiles of a bootstrap say too little: the variance of its means is short by (n - 1) / n, and
the tails of a skewed sample are not in it."""

RESAMPLES = 10_000
"""So many that a percentile of the means moves by less than a hundredth of the interval from seed to seed."""

_DRAWN_AT_ONCE = 4_000_000
"""Row numbers in memory at once, 32 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The scores of two models on the same rows; more is better."""

    rows: int
    before: float
    """Mean score."""
    after: float
    gain: float
    """Mean of the differences, row by row."""
    low: float
    """The gain is above it with `confidence`; on one side."""
    high: float
    """The gain is below it with `confidence`."""
    margin: float
    confidence: float

    @property
    def better(self) -> bool:
        """Whether the gain is above the margin with that confidence."""
        return self.low > self.margin

    def plain(self) -> dict[str, Any]:
        """For artifacts and manifests."""
        return asdict(self) | {"better": self.better}


def compare(
    before: Mapping[str, float], after: Mapping[str, float], *, margin: float, confidence: float, seed: int
) -> Comparison:
    """A paired bootstrap over rows, by percentiles (Efron and Tibshirani, ch. 13): rows are drawn with replacement, and
    each keeps the scores of both models, so that what makes a row hard for both does not blur the difference.

    Args:
        before, after: row -> score; a row that one of them lacks counts for neither.
        margin: a gain of the mean score, in the scores' unit.
        confidence: above 0.5, below 1.

    Raises:
        DataError: too few rows in common, or a score that is no finite number.
    """
    rows = sorted(before.keys() & after.keys())
    if len(rows) < MIN_ROWS:
        raise DataError(f"{len(rows)} held-out rows were scored for both models; a comparison needs {MIN_ROWS}")
    old, new = (np.array([scores[row] for row in rows], np.float64) for scores in (before, after))
    for name, scores in (("before", old), ("after", new)):
        if not np.isfinite(scores).all():
            row = rows[int(np.flatnonzero(~np.isfinite(scores))[0])]
            raise DataError(f"the score of held-out row {row} under the model {name} is no finite number")
    means = _resampled_means(new - old, seed=seed)
    low, high = np.quantile(means, [1 - confidence, confidence])
    return Comparison(
        rows=len(rows),
        before=float(old.mean()),
        after=float(new.mean()),
        gain=float((new - old).mean()),
        low=float(low),
        high=float(high),
        margin=margin,
        confidence=confidence,
    )


def _resampled_means(values: np.ndarray, *, seed: int) -> np.ndarray:
    """[RESAMPLES] means of as many values [N], drawn with replacement."""
    rng, at_once = np.random.default_rng(seed), max(1, _DRAWN_AT_ONCE // len(values))
    means = []
    for start in range(0, RESAMPLES, at_once):
        draws = rng.integers(0, len(values), (min(at_once, RESAMPLES - start), len(values)))
        means.append(values[draws].mean(axis=1))
    return np.concatenate(means)
