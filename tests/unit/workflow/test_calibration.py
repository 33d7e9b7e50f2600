"""Calibration from the sums of a loss equals the definition, prediction by prediction."""

import numpy as np
import pytest
import torch

from posttrain.data.types import Batch
from posttrain.model.losses.reward import BradleyTerryLoss
from posttrain.model.output import Output
from posttrain.workflow.calibration import BINS, calibration_error, reliability

RNG = np.random.default_rng(0)


def metrics_of(scores: np.ndarray) -> dict[str, float]:
    """Means over the pairs, as an engine makes them; two batches."""
    found: dict[str, float] = {}
    for part in np.split(scores, 2):
        output = Output(logprobs=torch.zeros(0), entropy=torch.zeros(0), scores={"score": torch.tensor(part)[:, None]})
        batch: Batch = type("Fields", (), {"fields": {}})()  # pyright: ignore[reportAssignmentType]
        _, sums = BradleyTerryLoss(bins=BINS)(output, batch)
        for name, value in sums.items():
            found[name] = found.get(name, 0.0) + float(value) / (len(scores) / 2)
    return found


def test_the_error_is_the_mean_gap_between_confidence_and_accuracy():
    scores = RNG.normal(0, 1.5, 400)
    scores[:2] = 90.0, -90.0  # a probability of one belongs to the last bin
    gaps = scores[0::2] - scores[1::2]
    sure, right = 1 / (1 + np.exp(-np.abs(gaps))), gaps > 0
    members = np.minimum(((sure - 0.5) / 0.05).astype(int), 9)
    here = [members == b for b in range(10)]
    expected = sum(abs(right[b].mean() - sure[b].mean()) * b.mean() for b in here)
    metrics = metrics_of(scores)
    assert calibration_error(metrics) == pytest.approx(expected, abs=1e-6)
    table = reliability(metrics, 200)
    assert sum(row["rows"] for row in table) == 200 and table[-1]["sure"] == "0.95-1.00"
    assert [row["rows"] for row in table] == np.bincount(members, minlength=10).tolist()
    assert table[3]["accuracy"] == pytest.approx(right[members == 3].mean(), abs=1e-4)
    assert table[3]["confidence"] == pytest.approx(sure[members == 3].mean(), abs=1e-4)


def test_bins_without_a_prediction_are_left_out():
    (row,) = reliability(metrics_of(np.array([3.0, 0.0, 3.0, 0.0])), 2)
    assert (row["rows"], row["accuracy"]) == (2, 1.0)
