"""When training state is saved, restored, and what happens if that fails: between the loop and the checkpoints.

A save costs training the copy to host memory. Ranks then write, and this process commits, while training goes on; it
is waited for before the next save, at the end, and before a stop. A disk that is full or a store that is away costs
that one save: it is told and counted, the last good one stays, and the run stops only once more work than
`lost_work_s` would be lost.
"""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from posttrain.compute.checkpoint import Attempt, Checkpoints
from posttrain.compute.committed import Found
from posttrain.deadline import within
from posttrain.errors import ComputeError, DamagedError, PreemptedError, StorageError
from posttrain.workflow.clock import SaveClock
from posttrain.workflow.policy import Policy
from posttrain.workflow.stopping import StopSignal

SMALL_S = 1.0
"""A save that is done by then is waited for, so that a small run's checkpoint is there when its next step begins; of
ten minutes between saves it is 0.2 %."""
LOST_WORK_SAVES = 3
"""Intervals without a good save after which a run stops rather than go on unsaved."""


class Saver:
    """Saves a policy's state as its clock says; after_step() is called after every optimizer step."""

    def __init__(self, policy: Policy, checkpoints: Checkpoints, *, clock: SaveClock, stop: StopSignal):
        self.policy, self.checkpoints, self.clock, self.stop = policy, checkpoints, clock, stop
        self.lost_work_s = LOST_WORK_SAVES * clock.every_seconds
        self.failures = 0
        self.stall_s = 0.0
        """How long training stood still for the last save."""
        self._shapes: dict[str, tuple[tuple[int, ...], int]] = {}
        self._good = time.monotonic()
        self._pending: asyncio.Task[str] | None = None

    def metrics(self) -> dict[str, float]:
        """checkpoint/failures, once there are any."""
        return {"checkpoint/failures": float(self.failures)} if self.failures else {}

    async def after_step(self, done: int, state: Callable[[], dict[str, Any]]) -> None:
        """Begin a save if one is due after `done` steps, see to the one under way, and stop if that was asked for.

        Args:
            state: the plain values to keep; its files must be durable when it returns.

        Raises:
            PreemptedError: a signal asked for a stop, and the state is saved.
            StorageError: the last save before an end failed, or too much work is unsaved.
            CheckpointError: another process writes these checkpoints now.
        """
        if self._pending is not None and self._pending.done():
            await self._settle()
        self.checkpoints.lease.check()
        asked, last = self.stop.asked, done == self.clock.num_steps
        if self.clock.due(done) or asked:
            start = time.perf_counter()
            await self._settle()
            await self._begin(done, state(), must=bool(asked) or last)
            self.stall_s = time.perf_counter() - start
        if asked or last:
            await self._settle(must=True)
        elif self._pending is not None:
            await asyncio.wait({self._pending}, timeout=SMALL_S)
        if asked:
            raise PreemptedError(f"stopped by {asked} after step {done}, which is saved; start the run again to go on")

    async def _begin(self, done: int, state: dict[str, Any], *, must: bool) -> None:
        if await asyncio.to_thread(self.checkpoints.is_committed, done):
            return
        if not self._shapes:
            self._shapes = await self.policy.group.call_one(0, "state_shapes", timeout_s=self.policy.timeout_s)
        try:
            attempt = self.checkpoints.begin(done, sum(size for _, size in self._shapes.values()))
        except StorageError as error:
            self._failed(error, must=must)
            return
        await self.policy.group.call("begin_save", attempt.folder, timeout_s=self.policy.timeout_s)
        self._pending = asyncio.create_task(self._complete(attempt, json.dumps(state)))

    async def _complete(self, attempt: Attempt, state: str) -> str:
        group, timeout_s = self.policy.group, self.policy.timeout_s
        outcomes: list[dict[str, Any] | None] = [None] * len(group)
        while None in outcomes:
            for rank in [rank for rank, outcome in enumerate(outcomes) if outcome is None]:
                outcomes[rank] = await group.call_one(rank, "save_result", timeout_s=timeout_s)
            await asyncio.sleep(0.02)
        failed = [each["failed"] for each in outcomes if each and "failed" in each]
        if failed:
            await asyncio.to_thread(self.checkpoints.discard, attempt)
            raise StorageError("; ".join(failed))
        reports = [each["report"] for each in outcomes if each]
        shapes = {name: shape for name, (shape, _) in self._shapes.items()}
        return await asyncio.to_thread(self.checkpoints.commit, attempt, shapes=shapes, reports=reports, state=state)

    async def _settle(self, *, must: bool = False) -> None:
        """Wait for the save under way, and take note of how it ended."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            await within(self.policy.timeout_s, "the checkpoint being written", pending)
        except StorageError as error:
            self._failed(error, must=must)
        else:
            self._good = time.monotonic()

    def _failed(self, error: StorageError, *, must: bool) -> None:
        self.failures += 1
        unsaved_s = time.monotonic() - self._good
        print(f"WARNING: a checkpoint failed, {unsaved_s:.0f} s of work are unsaved: {error}", flush=True)
        if must or unsaved_s > self.lost_work_s:
            raise error


async def restore(policy: Policy, checkpoints: Checkpoints) -> Found | None:
    """Load the newest checkpoint that proves to be whole into every rank, or None where there is none.

    Raises:
        CheckpointError: it belongs to another run or model.
        ComputeError: all were damaged, the last of them found so when weights were overwritten already.
    """
    spoiled = ""
    while (found := checkpoints.latest()) is not None:
        try:
            await policy.group.call("restore", found.uri, timeout_s=policy.timeout_s)
        except DamagedError as error:
            checkpoints.set_aside(found.uri, error)
            spoiled = found.uri
            continue
        return found
    if spoiled:
        raise ComputeError(f"{spoiled} was the last checkpoint, and is damaged; a retry begins with step 0")
    return None
