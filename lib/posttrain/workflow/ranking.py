"""Scores of all items become the field's ranking metrics; one item is right at each position. Pure numpy."""

from collections.abc import Sequence

import numpy as np


def ranks(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[N] float64: how many items stand before the right one, 0 the best; inf where it has no score.

    An item with the same score stands before it: a ranker that cannot tell items apart earns nothing.

    Args:
        scores: [N, C], -inf for what is not offered.
        targets: [N] int, the column of the right item; -1 where none is.
    """
    known = targets >= 0
    own = np.where(known, scores[np.arange(len(scores)), targets], -np.inf)
    before = (scores >= own[:, None]).sum(1) - 1.0
    return np.where(np.isneginf(own), np.inf, before)


def ranking_metrics(scores: np.ndarray, targets: np.ndarray, *, ks: Sequence[int] = (1, 10)) -> dict[str, float]:
    """Means over positions, each 0 to 1: recall@k, ndcg@k, mrr, and coverage@k.

    - recall@k: the right item is among the first k.
    - ndcg@k: 1 / log2(rank + 2) where it is, else 0; of one right item the ideal is 1 (Järvelin and Kekäläinen 2002).
    - mrr: 1 / (rank + 1), over the whole ranking.
    - coverage@k: the share of all C items that are among the first k of any position.

    Args:
        scores: [N, C].
        targets: [N], as ranks().
    """
    place, found = ranks(scores, targets), {}
    for k in ks:
        hit = place < k
        found[f"recall@{k}"] = float(hit.mean())
        found[f"ndcg@{k}"] = float(np.where(hit, 1 / np.log2(np.where(hit, place, 0) + 2), 0.0).mean())
        first = np.argpartition(-scores, min(k, scores.shape[1]) - 1, axis=1)[:, :k]
        offered = first[~np.isneginf(np.take_along_axis(scores, first, 1))]
        found[f"coverage@{k}"] = len(np.unique(offered)) / scores.shape[1]
    return found | {"mrr": float((1 / (place + 1)).mean())}
