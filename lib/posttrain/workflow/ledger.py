"""What was trained, counted and chained: the proof that a resumed run saw what the uninterrupted one saw."""

import hashlib
from collections.abc import Sequence
from typing import Any

from posttrain.data.types import Pack


class Ledger:
    """Draws admitted, trained and dropped by reason, and one digest over every global batch so far."""

    def __init__(self, state: dict[str, Any] | None = None):
        state = state or {"digest": "", "drawn": 0, "trained": 0, "dropped": {}}
        self.digest: str = state["digest"]
        self.drawn: int = state["drawn"]
        self.trained: int = state["trained"]
        self.dropped: dict[str, int] = dict(state["dropped"])

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"digest": self.digest, "drawn": self.drawn, "trained": self.trained, "dropped": dict(self.dropped)}

    def draw(self) -> int:
        """The next draw number; every number is given out once."""
        self.drawn += 1
        return self.drawn - 1

    def drop(self, reason: str) -> int:
        """Count a dropped draw; return how many had this reason."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        return self.dropped[reason]

    def commit(self, packs: Sequence[Pack], *, draws: int) -> None:
        """Chain a trained global batch: sha256 over the last digest and every sample's ids, targets and mask."""
        chain = hashlib.sha256(self.digest.encode())
        for pack in packs:
            for sample in pack.samples:
                for column in (sample.input_ids, sample.target_ids, sample.loss_mask):
                    chain.update(column.tobytes())
                if sample.advantages is not None:
                    chain.update(sample.advantages.tobytes())
        self.digest = chain.hexdigest()
        self.trained += draws

    def balance(self) -> int:
        """Draws neither trained nor dropped; 0 between steps."""
        return self.drawn - self.trained - sum(self.dropped.values())
