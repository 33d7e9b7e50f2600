import math

import numpy as np
import pytest

from posttrain.workflow.ranking import ranking_metrics, ranks


def brute_force(scores, targets, k):
    """The metrics by sorting every row, without ties."""
    recall, ndcg, mrr, offered = [], [], [], set()
    for row, target in zip(scores, targets, strict=True):
        order = sorted(range(len(row)), key=lambda item: -row[item])
        place = order.index(target)
        recall.append(place < k)
        ndcg.append(1 / math.log2(place + 2) if place < k else 0.0)
        mrr.append(1 / (place + 1))
        offered |= set(order[:k])
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {"recall": mean(recall), "ndcg": mean(ndcg), "mrr": mean(mrr), "coverage": len(offered) / len(scores[0])}


@pytest.mark.parametrize("k", [1, 3, 10, 25])
def test_metrics_are_those_of_sorted_rows(k):
    rng = np.random.default_rng(k)
    scores, targets = rng.normal(size=(40, 25)), rng.integers(0, 25, 40)
    found, expected = ranking_metrics(scores, targets, ks=(k,)), brute_force(scores.tolist(), targets.tolist(), k)
    for name in ("recall", "ndcg", "coverage"):
        assert found[f"{name}@{k}"] == pytest.approx(expected[name])
    assert found["mrr"] == pytest.approx(expected["mrr"])


def test_an_item_with_the_same_score_stands_before_the_right_one():
    assert ranks(np.array([[1.0, 1.0, 0.0]]), np.array([0])).tolist() == [1.0]


def test_what_is_not_offered_is_never_found():
    scores = np.array([[0.0, -np.inf, 1.0], [0.0, 1.0, -np.inf]])
    targets = np.array([1, -1])
    assert ranks(scores, targets).tolist() == [np.inf, np.inf]
    found = ranking_metrics(scores, targets, ks=(3,))
    assert found["recall@3"] == found["ndcg@3"] == found["mrr"] == 0 and found["coverage@3"] == 1


def test_coverage_counts_no_item_that_nobody_is_offered():
    scores = np.array([[3.0, 2.0, -np.inf, -np.inf]] * 5)
    assert ranking_metrics(scores, np.zeros(5, int), ks=(3,))["coverage@3"] == 0.5
