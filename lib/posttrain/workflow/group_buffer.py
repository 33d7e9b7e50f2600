"""Which draw may begin, and which groups are the next batch: begun in draw order, trained in draw order.

So what a batch holds depends on which draws are dropped, and not on who is fast; and no rollout is older than
`max_staleness` optimizer steps when it is trained.

Proof. Let P be prompts_per_step and k max_staleness; weights of version v are those after v steps. A draw is begun only
while fewer than (v + k + 1) P draws before it are trained, scored, or may still be, where v is a version that every
generator holds. Batch s is the groups sP to sP + P - 1 in draw order, dropped ones left out. So a draw that is trained
in step s has at least sP such draws before it: when it was begun, sP < (v + k + 1) P, and with whole numbers
s <= v + k. Its tokens are of version v or newer, as generators only ever get newer weights: of version s - k or newer.

With k = 0 nothing is begun ahead: this is synchronous training.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass

from posttrain.deadline import within
from posttrain.errors import RewardError
from posttrain.workflow.ledger import Ledger
from posttrain.workflow.rollouts import Dropped, Group, Limit

MAX_SILENT_BATCHES = 10
"""Batches' worth of groups in a row that may all be without a signal; a task too easy or too hard stops the run."""


@dataclass(eq=False)
class _Wave:
    """Draws that are begun together. What is dropped of them is replaced when all are done, so that the calls to an
    engine stay large, and the same however long each took."""

    unfinished: int
    dropped: int = 0
    """Of its draws that are still in the buffer; their places are free again once the wave is done."""


@dataclass(eq=False)
class _Slot:
    wave: _Wave
    made: Group | Dropped | None = None


class GroupBuffer:
    """The draws between admission and training, in draw order; all others are in the ledger alone.

    Args:
        ledger: gives out the draws, and counts those that are dropped when training passes them.
        limits: reason -> how many groups the run may drop for it.
    """

    def __init__(
        self, ledger: Ledger, *, prompts_per_step: int, max_staleness: int, num_steps: int, limits: dict[str, Limit]
    ):
        self.ledger, self.limits = ledger, limits
        self.prompts_per_step, self.max_staleness, self.num_steps = prompts_per_step, max_staleness, num_steps
        self._taken = ledger.trained
        """Groups handed out to be trained; the ledger counts them only when they are."""
        self._slots: dict[int, _Slot] = {}
        # What the slots hold, counted as it changes: a step of thousands of groups asks at each one's end.
        self._places, self._scored, self._dropped = 0, 0, Counter[str]()
        self._silent = 0
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._slots)

    def admit(self, version: int) -> list[int]:
        """Draws that may begin now.

        Args:
            version: all generators hold weights of this version or newer.
        """
        most = min(version + self.max_staleness + 1, self.num_steps) * self.prompts_per_step
        room = most - self._taken - self._places
        wave = _Wave(max(0, room))
        admitted = [self.ledger.draw() for _ in range(room)]
        self._slots |= {uid: _Slot(wave) for uid in admitted}
        self._places += len(admitted)
        return admitted

    def finish(self, uid: int, made: Group | Dropped) -> None:
        """Take what became of an admitted draw.

        Raises:
            RewardError, ComputeError: more groups were dropped than may be.
        """
        slot = self._slots[uid]
        assert slot.made is None, f"draw {uid} was finished before"
        slot.made = made
        slot.wave.unfinished -= 1
        if isinstance(made, list):
            self._scored += 1
        else:
            slot.wave.dropped += 1
            self._dropped[made.reason] += 1
        if not slot.wave.unfinished:
            self._places -= slot.wave.dropped
        self.ledger.move(uid, "scored" if isinstance(made, list) else f"to be dropped: {made.reason}")
        self._changed.set()
        if isinstance(made, list):
            self._silent = 0
        else:
            self._check(made)

    def take(self) -> list[Group] | None:
        """The next batch, if all of it is there; drops that lie before its end are then counted."""
        if self._scored < self.prompts_per_step:
            return None
        batch: list[int] = []
        dropped: dict[int, Dropped] = {}
        for uid, slot in self._slots.items():
            if len(batch) == self.prompts_per_step or slot.made is None:
                break
            if isinstance(slot.made, Dropped):
                dropped[uid] = slot.made
            else:
                batch.append(uid)
        if len(batch) < self.prompts_per_step:
            return None
        for uid, each in dropped.items():
            wave = self._slots.pop(uid).wave
            wave.dropped -= 1
            self._places -= wave.unfinished > 0
            self._dropped[each.reason] -= 1
            self.ledger.drop(each.reason, uid)
        self._taken += len(batch)
        self._scored -= len(batch)
        self._places -= len(batch)
        return [made for uid in batch if isinstance(made := self._slots.pop(uid).made, list)]

    async def next_batch(self, *, stall_s: float) -> list[Group]:
        """take(), as soon as there is one.

        Raises:
            DeadlineError: no draw was finished, and nothing woke it, for `stall_s` seconds; says how far they are.
        """
        while (batch := self.take()) is None:
            self._changed.clear()
            await within(stall_s, self._stalled, self._changed.wait())
        return batch

    def wake(self) -> None:
        """Count the time of next_batch() anew."""
        self._changed.set()

    def _stalled(self) -> str:
        phases = {phase: uids for phase, uids in self.ledger.state()["open"].items() if phase != "scored"}
        how_far = (f"{len(uids)} {phase.replace('_', ' ')}, first draw {uids[0]}" for phase, uids in phases.items())
        return f"no group came to an end; {'; '.join(how_far)}: the next"

    def _check(self, dropped: Dropped) -> None:
        limit = self.limits.get(dropped.reason)
        if limit is not None:
            limit.check(self.ledger.dropped.get(dropped.reason, 0) + self._dropped[dropped.reason], dropped)
        self._silent += dropped.reason == "no_signal"
        if self._silent == MAX_SILENT_BATCHES * self.prompts_per_step:
            raise RewardError(
                f"method.replace_silent: {self._silent} groups in a row had no different rewards: the task is too "
                "easy, too hard, or the reward does not vary. Fix: other prompts, a larger method.group_size, or "
                "replace_silent off"
            )
