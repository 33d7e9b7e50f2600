"""A paired bootstrap says how sure a gain is: as often right as it claims, and paired."""

import numpy as np
import pytest

from posttrain.errors import DataError
from posttrain.workflow.compare import MIN_ROWS, compare


def scores(values) -> dict[str, float]:
    return {str(number): float(value) for number, value in enumerate(values)}


def compared(before, after, *, margin=0.0, confidence=0.95, seed=0):
    return compare(scores(before), scores(after), margin=margin, confidence=confidence, seed=seed)


def test_the_interval_is_that_of_the_central_limit_where_that_holds():
    rng = np.random.default_rng(0)
    before, gains = rng.normal(0, 5, 2000), rng.normal(0.1, 1, 2000)
    found = compared(before, before + gains, confidence=0.9)
    error = gains.std() / np.sqrt(2000)
    assert found.gain == pytest.approx(gains.mean())
    assert found.low == pytest.approx(gains.mean() - 1.2816 * error, abs=error / 20)
    assert found.high == pytest.approx(gains.mean() + 1.2816 * error, abs=error / 20)
    assert found.better, "paired: the rows' own spread of 5 would hide a gain of 0.1"


def test_equal_models_are_called_better_as_rarely_as_the_confidence_says():
    rng = np.random.default_rng(1)
    wrong = 0
    for seed in range(200):
        before = rng.normal(0, 1, 100)
        wrong += compared(before, before + rng.normal(0, 1, 100), confidence=0.9, seed=seed).better
    assert 8 <= wrong <= 34, "20 of 200 are expected, give or take 3 standard deviations"


def test_the_margin_must_be_exceeded_and_no_change_is_no_gain():
    before = np.linspace(0, 1, 50)
    assert not compared(before, before).better
    assert compared(before, before + 0.25, margin=0.2).better
    assert not compared(before, before + 0.25, margin=0.25 + 1e-9).better
    assert not compared(before, before - 0.25).better


def test_more_confidence_asks_for_more():
    rng = np.random.default_rng(2)
    before = rng.normal(0, 1, 200)
    after = before + rng.normal(0.12, 1, 200)
    lows = [compared(before, after, confidence=c).low for c in (0.6, 0.9, 0.99)]
    assert lows == sorted(lows, reverse=True) and len(set(lows)) == 3


def test_the_same_seed_gives_the_same_interval_and_rows_in_any_order():
    rng = np.random.default_rng(3)
    before, after = scores(rng.normal(0, 1, 60)), scores(rng.normal(0, 1, 60))
    one = compare(before, after, margin=0, confidence=0.95, seed=4)
    two = compare(dict(reversed(before.items())), after, margin=0, confidence=0.95, seed=4)
    assert one == two != compare(before, after, margin=0, confidence=0.95, seed=5)


def test_rows_that_one_model_lacks_count_for_neither():
    before, after = scores([0.0] * 40), scores([1.0] * 30)
    found = compare(before | {"x": 100.0}, after | {"y": -100.0}, margin=0, confidence=0.95, seed=0)
    assert (found.rows, found.gain) == (30, 1.0)


def test_too_few_rows_and_scores_that_are_no_numbers_are_refused():
    with pytest.raises(DataError, match=f"19 held-out rows were scored for both models; a comparison needs {MIN_ROWS}"):
        compared([0] * 19, [1] * 19)
    with pytest.raises(DataError, match="row 3 under the model after is no finite number"):
        compared([0] * 30, [1, 1, 1, float("inf"), *[1] * 26])
