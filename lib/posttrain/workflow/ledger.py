"""What was trained, counted and chained: the proof that a resumed run saw what the uninterrupted one saw."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.data.types import Pack


class Ledger:
    """Draws admitted, trained and dropped by reason, and one digest over every global batch so far.

    A draw that draw() gave out is open until it is trained or dropped: "queued", then "in_flight" at a generator,
    then "scored". What was open when a state was saved is drawn again after a restore: its seeds follow from its
    number, so it is lost to none and trained once.
    """

    def __init__(self, state: dict[str, Any] | None = None):
        state = state or {"digest": "", "drawn": 0, "trained": 0, "dropped": {}}
        self.digest: str = state["digest"]
        self.trained: int = state["trained"]
        self.dropped: dict[str, int] = dict(state["dropped"])
        self.drawn: int = state["drawn"] - sum(map(len, state.get("open", {}).values()))
        self.open: dict[int, str] = {}

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        phases: dict[str, list[int]] = {}
        for uid, phase in self.open.items():
            phases.setdefault(phase, []).append(uid)
        counts = {"drawn": self.drawn, "trained": self.trained, "dropped": dict(self.dropped)}
        return {"digest": self.digest, **counts, "open": phases}

    def draw(self) -> int:
        """The next draw number; every number is given out once."""
        self.open[self.drawn] = "queued"
        self.drawn += 1
        return self.drawn - 1

    def move(self, uid: int, phase: str) -> None:
        """Note how far an open draw has come."""
        assert uid in self.open, f"draw {uid} is not open"
        self.open[uid] = phase

    def drop(self, reason: str, uid: int | None = None) -> int:
        """Count a dropped draw; return how many had this reason."""
        if uid is not None:
            del self.open[uid]
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        return self.dropped[reason]

    def hand_out(self, units: int, dropped: Mapping[str, int]) -> None:
        """Count what a stream gave for one global batch: its units, and all drops of the run so far by reason.

        A row that was split counts once for every unit it became.
        """
        fewer = [reason for reason, count in self.dropped.items() if dropped.get(reason, 0) < count]
        assert not fewer, f"the stream counts fewer drops than the ledger: {fewer[0]} in {dropped} < {self.dropped}"
        self.drawn += units + sum(dropped.values()) - sum(self.dropped.values())
        self.dropped = dict(dropped)

    def commit(self, packs: Sequence[Pack], *, draws: Sequence[int]) -> dict[str, Any]:
        """Chain a trained global batch: sha256 over the last digest and every sample's ids, targets and mask.

        Args:
            draws: number of every draw that is trained with this batch, in any order: those of its packs, or the
                uids of its prompts. One that was split occurs once for every unit.

        Returns:
            what a LedgerFile keeps beside the step: the digest; the draws as ascending [first, last] ranges, which
            overlap where a number occurs again; and the drops so far by reason.
        """
        chain = hashlib.sha256(self.digest.encode())
        for pack in packs:
            for sample in pack.samples:
                chain.update(len(sample).to_bytes(8, "little"))  # where a document ends decides what attends to what
                for column in (sample.input_ids, sample.target_ids, sample.loss_mask):
                    chain.update(column.tobytes())
                if sample.advantages is not None:
                    chain.update(sample.advantages.tobytes())
        self.digest = chain.hexdigest()
        self.trained += len(draws)
        for uid in draws:
            self.open.pop(uid, None)
        return {"digest": self.digest, "draws": _ranges(draws), "dropped": dict(self.dropped)}

    def balance(self) -> int:
        """Draws neither trained nor dropped; 0 between steps, but for draws that are open ahead of training."""
        return self.drawn - self.trained - sum(self.dropped.values())


def _ranges(numbers: Sequence[int]) -> list[list[int]]:
    """[5, 3, 4, 9] -> [[3, 5], [9, 9]]; nothing is lost: [3, 3, 4] -> [[3, 3], [3, 4]]."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges
