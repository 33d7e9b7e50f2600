"""Is a reward model as sure as it is right? The sums that its loss takes in bins become a table and one number."""

from collections.abc import Mapping
from typing import Any

BINS = 10
"""Equal parts of the probabilities 0.5 to 1 that the likelier outcome is given."""


def reliability(metrics: Mapping[str, float], count: float) -> list[dict[str, Any]]:
    """The bins that hold a prediction, the least sure first.

    Args:
        metrics: means of a loss with `bins` = BINS over `count` predictions.

    Returns:
        sure: the bin, as "0.50-0.55"; rows: predictions in it; confidence: their mean probability; accuracy: the share
        that came true.
    """
    found = []
    for number in range(BINS):
        share = metrics[f"bin_{number}/count"]
        if share > 0:
            low, high = (0.5 + 0.5 * edge / BINS for edge in (number, number + 1))
            means = {name: round(metrics[f"bin_{number}/{name}"] / share, 4) for name in ("confidence", "accuracy")}
            found.append({"sure": f"{low:.2f}-{high:.2f}", "rows": round(share * count), **means})
    return found


def calibration_error(metrics: Mapping[str, float]) -> float:
    """Expected calibration error, sum_b n_b / n |accuracy_b - confidence_b| (arXiv:1706.04599, eq. 3)."""
    return sum(abs(metrics[f"bin_{b}/accuracy"] - metrics[f"bin_{b}/confidence"]) for b in range(BINS))
