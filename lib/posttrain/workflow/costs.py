"""What packs cost a model, for dealing them evenly and for saying what share of a device's peak a step used."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posttrain.data.pack import attention_cost
from posttrain.data.types import Pack
from posttrain.model.flops import FlopCounts, mfu


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What the driver needs to know of a model: what packs cost it, and what its device could do."""

    counts: FlopCounts | None
    """None for a model of unknown shape."""
    linear: float
    quadratic: float
    """Of attention_cost, for that model."""
    peak: float | None
    """FLOP/s of one device by its data sheet, None where unknown."""
    sharded: bool = False
    """Whether the ranks hold shards, and so must go through a step together."""

    def of(self, pack: Pack) -> float:
        """FLOPs of a pack, forward and backward; in some other unit for a model of unknown shape."""
        if self.counts is None:
            return attention_cost(pack, linear=self.linear, quadratic=self.quadratic)
        rows = sum(int(np.count_nonzero(sample.loss_mask)) for sample in pack.samples)
        return self.counts.step([len(sample) for sample in pack.samples], rows)

    def metrics(self, packs: Sequence[Pack], seconds: float, *, ranks: int, pack_tokens: int) -> dict[str, float]:
        """Useful FLOP/s of one device in a step, as a number and, where its peak is known, as a share: exact (see
        model/flops.py), and by PaLM's convention at the length of a pack, for comparing with who reports that."""
        if self.counts is None:
            return {}
        total, tokens = sum(map(self.of, packs)), sum(pack.num_tokens for pack in packs)
        found = {"perf/tflops": total / seconds / ranks / 1e12}
        exact = mfu(total, seconds, ranks, self.peak)
        palm = mfu(self.counts.palm(tokens, pack_tokens), seconds, ranks, self.peak)
        return found if exact is None or palm is None else found | {"perf/mfu": exact, "perf/mfu_palm": palm}
