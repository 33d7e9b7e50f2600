"""What the data look like, as plain values: lengths, mixture, one document's mask, and how packs are filled.

The same report is drawn on the data card and printed by `posttrain preview`.
"""

from typing import Any

import numpy as np

from posttrain.data.counts import Counts
from posttrain.data.mixture import Mixture
from posttrain.data.stream import Window
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.types import Pack, Sample
from posttrain.errors import RowError

SHOWN_TOKENS = 500
SHOWN_PACKS = 8
QUANTILES = (0, 50, 90, 99, 100)


def length_report(lengths: np.ndarray) -> dict[str, Any]:
    """Quantiles, and a histogram with an edge at every power of two.

    Args:
        lengths: [N] tokens of every unit.
    """
    if not len(lengths):
        return {
            "quantiles": dict.fromkeys((f"p{q}" for q in QUANTILES), 0),
            "lengths": {"edges": [1, 2], "counts": [0]},
        }
    low, high = int(np.log2(lengths.min())), int(np.log2(lengths.max())) + 1
    edges = 2 ** np.arange(low, high + 1)
    counts, _ = np.histogram(lengths, edges)
    return {
        "quantiles": {f"p{q}": int(np.percentile(lengths, q)) for q in QUANTILES},
        "lengths": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def preview(sample: Sample, tokenizer: BaseHFModelTokenizer) -> list[dict[str, Any]]:
    """Every target token as text, and whether it is trained."""
    return [
        {"token": tokenizer.hf.decode([int(token)]), "trained": bool(weight)}
        for token, weight in zip(sample.target_ids[:SHOWN_TOKENS], sample.loss_mask[:SHOWN_TOKENS], strict=True)
    ]


def packed_rows(window: Window, mixture: Mixture) -> list[dict[str, Any]]:
    """The first packs of a window: tokens and source of every document in them."""
    draws = mixture.window(window.index)
    return [{"documents": _documents(pack, draws.source, draws.first)} for pack in window.packs[:SHOWN_PACKS]]


def _documents(pack: Pack, source_of: np.ndarray, first: int) -> list[dict[str, int]]:
    per_unit, odd = divmod(len(pack.samples), pack.num_units)
    assert not odd, "all units of a recipe have as many documents"
    return [
        {
            "source": int(source_of[pack.draws[index // per_unit] - first]),
            "tokens": len(sample),
            "trained": int((sample.loss_mask > 0).sum()),
        }
        for index, sample in enumerate(pack.samples)
    ]


def shares(window: Window, mixture: Mixture) -> list[float]:
    """Share of the window's draws that each source has."""
    source_of = mixture.window(window.index).source
    counts = np.bincount(source_of, minlength=len(mixture.parts))
    return [round(float(count / max(1, len(source_of))), 4) for count in counts]


def window_counts(window: Window, mixture: Mixture, *, unknown_id: int | None) -> list[tuple[Counts, np.ndarray]]:
    """What each source's draws of a window came to, and [N] tokens of its units."""
    draws = mixture.window(window.index)
    counts = [Counts() for _ in mixture.parts]
    lengths: list[list[int]] = [[] for _ in mixture.parts]
    for pack in window.packs:
        per_unit = len(pack.samples) // pack.num_units
        for number, draw in enumerate(pack.draws):
            source = int(draws.source[draw - draws.first])
            unit = pack.samples[number * per_unit : (number + 1) * per_unit]
            counts[source].add([unit], unknown_id=unknown_id)
            lengths[source].append(sum(map(len, unit)))
    for dropped in window.dropped:
        counts[int(draws.source[dropped.draw - draws.first])].add(
            RowError(dropped.reason, dropped.where), unknown_id=unknown_id
        )
    return [(each, np.array(found, np.int64)) for each, found in zip(counts, lengths, strict=True)]
