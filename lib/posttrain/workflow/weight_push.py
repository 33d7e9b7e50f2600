"""One sync: the policy's weights go to all generators, by the way that fits where they are, and are proved to be there.

"store": through host memory and Ray's object store, to any generator. "broadcast": in buckets, from rank 0's GPU to the
GPUs of all engines. "ipc": in buckets, from each rank to the engine that shares its GPU. In the last two, each wait is
for one side alone, but for the broadcast itself, where the generators' deadline comes first: rank 0 is ready by then.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, Literal

from posttrain.compute.weight_sync import Part
from posttrain.compute.workers import first_cause
from posttrain.errors import SyncError
from posttrain.workflow.generators import Generators
from posttrain.workflow.policy import Policy

Way = Literal["store", "broadcast", "ipc"]


class WeightPush:
    """Sends weights from one policy to its generators.

    Args:
        way: see above; generators that are replaced after a death get theirs through the store.
        adapters: of a policy that trains adapters, send the weights that stand still once to each generator, and from
            then on adapters alone; all that is sent has them merged otherwise.
    """

    def __init__(self, policy: Policy, generators: Generators, *, way: Way = "store", adapters: bool = False):
        self.policy, self.generators, self.way = policy, generators, way
        self._all: Part = "whole" if adapters else "merged"
        self._later: Part = "adapters" if adapters else "merged"
        self._holders: dict[int, Any] = {}
        """By generator, the actor that was sent all weights and holds them: not one in its place."""
        self.timeout_s = policy.timeout_s
        self._deaths: int | None = None
        """Of generators, when those that live now were met."""
        self._partners: list[int] = []
        """By generator, the policy rank on the same GPU."""
        self._handles: list[Any] = []

    async def push(self, version: int, dtype: str, *, dead_only: bool = False) -> None:
        """Send the weights as `version`.

        Raises:
            SyncError: a generator holds others than were sent.
            ComputeError: one side died, or did not answer in time; it is named.
        """
        if self.way == "store" or dead_only or self.generators.dead:
            expected, held = await self._store(version, dtype, dead_only=dead_only)
        else:
            parts = {self._part(rank) for rank in range(len(self.generators.group))}
            part = self._all if self._all in parts else self._later
            async with self.generators.between_calls():
                await self._meet()
                found, sent = await self._buckets(version, dtype, part)
            held = dict(enumerate(found))
            expected = dict.fromkeys(held, sent)
        for rank, got in held.items():
            if got != expected[rank]:
                raise SyncError(
                    f"generator {rank} holds {got[:12]} after the sync to version {version}, "
                    f"the policy sent {expected[rank][:12]}"
                )
            self._holders[rank] = self.generators.group.actors[rank]

    def _part(self, rank: int) -> Part:
        """What a generator is to get."""
        return self._later if self._holders.get(rank) is self.generators.group.actors[rank] else self._all

    async def _store(self, version: int, dtype: str, *, dead_only: bool) -> tuple[dict[int, str], dict[int, str]]:
        """Digests of what was sent and of what is held, by generator."""
        parts: dict[int, Part] = {}
        handles: dict[Part, Any] = {}

        def weights(rank: int) -> Any:
            part = parts[rank] = self._part(rank)
            if part not in handles:
                handles[part] = self.policy.start_weights(dtype, part)
            return handles[part]

        held = await self.generators.sync(version, weights, dead_only=dead_only)
        digests = {part: await self.policy.weights_digest(dtype, part) for part in handles}
        return {rank: digests[parts[rank]] for rank in held}, held

    async def _buckets(self, version: int, dtype: str, part: Part) -> tuple[list[str], str]:
        """Digests of what each engine holds, and of what was sent, which are taken at once."""
        engines = self.generators.group
        await engines.call("begin_sync", version, timeout_s=self.timeout_s)
        await self._senders("start", dtype, part)
        while packed := (await self._senders("fill"))[0]:
            if self.way == "ipc":
                each = [((packed, handle), {}) for handle in self._handles]
                await engines.call_each("load_bucket", each, timeout_s=self.timeout_s)
            else:
                sending = self.policy.group.call_one(0, "sender", "send", timeout_s=1.5 * self.timeout_s)
                loading = engines.call("load_bucket", packed, timeout_s=self.timeout_s)
                await both(loading, sending)
        held, sent = await both(
            engines.call("end_sync", timeout_s=self.timeout_s), self.policy.weights_digest(dtype, part)
        )
        return held, sent

    async def _meet(self) -> None:
        """Find partners, once, and again after a generator was replaced."""
        if self._deaths == self.generators.deaths:
            return
        if self.way == "ipc":
            await self._pair()
        else:
            await self._join()
        self._deaths = self.generators.deaths

    async def _pair(self) -> None:
        ranks = await self._senders("gpu")
        engines = await self.generators.group.call("gpu", timeout_s=self.timeout_s)
        for rank, gpu in enumerate(engines):
            if gpu not in ranks:
                raise SyncError(f"generator {rank} is on GPU {gpu}, and no policy rank is: {ranks}")
        self._partners = [ranks.index(gpu) for gpu in engines]
        handles = await self._senders("handle")
        self._handles = [handles[partner] for partner in self._partners]

    async def _join(self) -> None:
        engines, timeout_s = self.generators.group, self.timeout_s
        workers = await engines.call("workers", timeout_s=timeout_s)
        address = await self.policy.group.call_one(0, "meet_engines", timeout_s=timeout_s)
        world_size = 1 + sum(workers)
        firsts = [1 + sum(workers[:rank]) for rank in range(len(workers))]
        each = [((address, first, world_size, timeout_s), {}) for first in firsts]
        joining = self.policy.group.call_one(0, "sender", "join", world_size, timeout_s, timeout_s=1.5 * timeout_s)
        await both(engines.call_each("join", each, timeout_s=timeout_s), joining)

    async def _senders(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every policy rank's Sender."""
        return await self.policy.group.call("sender", method, *args, timeout_s=self.timeout_s)


async def both(*calls: Coroutine[Any, Any, Any]) -> list[Any]:
    """Await two sides that go on at once; a death on one is the cause of what the other raises."""
    return await first_cause([asyncio.ensure_future(call) for call in calls])
