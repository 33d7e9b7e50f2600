"""Requests of many coroutines become calls to generators: who asks waits for its own answer, and nothing else.

A generator that takes one call at a time gets all that waits in one large call, as that is what a batch engine is
fast at; one that takes many gets a call for each that asks. One that dies, or hangs and is killed at its deadline, is
replaced, sent the current weights, and what it was at is asked again, with the same seeds.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from posttrain.compute.generator import Completion, Request
from posttrain.compute.workers import ActorGroup, first_cause
from posttrain.errors import ComputeError, GenerationError, WorkerDiedError, WorkerHungError


@dataclass(eq=False)
class _Asked:
    """What one coroutine waits for."""

    requests: Sequence[Request]
    answer: asyncio.Future[list[Completion]]
    began: Callable[[], None]
    alone: bool = False
    """Whether it goes in a call of its own, since one with others failed."""


@dataclass
class Busy:
    """Seconds during which at least one call was under way."""

    seconds: float = 0.0
    calls: int = 0
    since: float = field(default_factory=time.perf_counter)

    def add(self, calls: int) -> None:
        """Note that so many calls began, or, below 0, ended."""
        now = time.perf_counter()
        self.seconds += now - self.since if self.calls else 0.0
        self.calls, self.since = self.calls + calls, now

    def total(self) -> float:
        """Seconds so far."""
        self.add(0)
        return self.seconds


class Generators:
    """The generators of a run, behind one generate().

    Args:
        max_failures: deaths and hangs in the whole run that are made good; one more stops it.
    """

    def __init__(self, group: ActorGroup, *, timeout_s: float, max_failures: int = 0):
        self.group, self.timeout_s, self.max_failures = group, timeout_s, max_failures
        # One thread of an actor that takes many calls is kept for sync(), which would else wait behind them.
        self.calls_at_once = max(1, group.pool.concurrency - 1)
        self.send_weights: Callable[[], Coroutine[Any, Any, None]] | None = None
        """Calls sync() with the current weights; a dead generator is replaced only where there is one who can."""
        self.deaths = 0
        self.busy = Busy()
        self._waiting: deque[_Asked] = deque()
        self._calls: list[set[asyncio.Task[None]]] = [set() for _ in range(len(group))]
        self._repairs: set[asyncio.Task[None]] = set()
        self._dead: set[int] = set()
        self._held = False

    async def generate(self, requests: Sequence[Request], began: Callable[[], None] = lambda: None) -> list[Completion]:
        """Completions in the order of the requests, all of one generator.

        Args:
            began: called when the requests leave for a generator; once more where they must leave again.

        Raises:
            GenerationError: the generator raised on these requests, or answered another number.
            ComputeError: it died or hung, and more have than may.
        """
        loop = asyncio.get_running_loop()
        asked = _Asked(requests, loop.create_future(), began)
        self._waiting.append(asked)
        if len(self._waiting) == 1:
            loop.call_soon(self._hand_out)  # after all coroutines that are about to ask: they share a call
        return await asked.answer

    async def weight_dtype(self) -> str:
        """Name of the dtype that sync() wants."""
        return (await self.group.call("weight_dtype", timeout_s=self.timeout_s))[0]

    async def sync(self, version: int, weights: Callable[[int], Any], *, dead_only: bool = False) -> dict[int, str]:
        """Send weights to all generators, replacing those that die or hang; digests of what they hold, by rank.

        A generator that takes one call at a time is between calls then.

        Args:
            weights: (rank) -> what that generator gets, or a handle to it; asked again if another takes its place.

        Raises:
            ComputeError: one died or hung, and more have than may; or the weights did not come.
        """
        ranks = sorted(self._dead) if dead_only else list(range(len(self.group)))
        self._held = not dead_only and self.calls_at_once == 1
        try:
            if self._held and (running := set().union(*self._calls)):
                await asyncio.wait(running)  # each call has its deadline
            sent = [asyncio.ensure_future(self._sync(rank, version, weights)) for rank in ranks]
            held = await first_cause(sent) if sent else []
        finally:
            self._held = False
        self._hand_out()
        return dict(zip(ranks, held, strict=True))

    @asynccontextmanager
    async def between_calls(self) -> AsyncIterator[None]:
        """Inside, generators that take one call at a time are at none."""
        self._held = self.calls_at_once == 1
        try:
            if self._held and (running := set().union(*self._calls)):
                await asyncio.wait(running)  # each call has its deadline
            yield
        finally:
            self._held = False
        self._hand_out()

    @property
    def dead(self) -> bool:
        """Whether one is to be replaced."""
        return bool(self._dead)

    async def close(self) -> None:
        """End all waits; the generators themselves end with their cluster."""
        self._waiting.clear()
        tasks = set().union(*self._calls, self._repairs)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _sync(self, rank: int, version: int, weights: Callable[[int], Any]) -> str:
        while True:
            if rank in self._dead:
                self.group.replace(rank)
            sent = weights(rank)
            try:
                digest = await self.group.call_one(rank, "sync", version, sent, timeout_s=self.timeout_s)
            except (WorkerDiedError, WorkerHungError) as error:
                if isinstance(error, WorkerHungError) and not self.group.is_there(sent):
                    raise WorkerHungError(
                        f"{error}\nIt waited for weights that did not come: the policy hangs"
                    ) from None
                self._lost(rank, error)
                continue
            self._dead.discard(rank)
            return digest

    def _hand_out(self) -> None:
        """Give what waits to the generators that have room, evenly."""
        living = [rank for rank in range(len(self.group)) if rank not in self._dead]
        share = 1
        if self.calls_at_once == 1:  # else too many calls end for a look at all that waits
            self._waiting = deque(asked for asked in self._waiting if not asked.answer.done())
            share = -(-len(self._waiting) // max(1, len(living)))
        while self._waiting and not self._held:
            free = [rank for rank in living if len(self._calls[rank]) < self.calls_at_once]
            if not free:
                return
            calls = self._next_call(share)
            if not calls:
                return
            rank = min(free, key=lambda rank: len(self._calls[rank]))
            self._start(self._calls[rank], self._call(rank, calls))

    def _next_call(self, share: int) -> list[_Asked]:
        """Up to `share` of those who wait, in their order; one who must go alone does. Nobody waits for the others."""
        calls: list[_Asked] = []
        while self._waiting and len(calls) < share:
            if self._waiting[0].answer.done():
                self._waiting.popleft()
            elif self._waiting[0].alone and calls:
                break
            else:
                calls.append(self._waiting.popleft())
                if calls[0].alone:
                    break
        return calls

    def _start(self, tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        tasks.add(task)
        task.add_done_callback(partial(self._ended, tasks))

    def _ended(self, tasks: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        self._hand_out()

    async def _call(self, rank: int, calls: list[_Asked]) -> None:
        requests = [request for asked in calls for request in asked.requests]
        for asked in calls:
            asked.began()
        self.busy.add(1)
        actor = self.group.actors[rank]
        try:
            made = await self.group.call_one(rank, "generate", requests, timeout_s=self.timeout_s)
            if len(made) != len(requests):
                raise GenerationError(f"generator {rank} answered {len(made)} of {len(requests)} requests")
            for asked in calls:
                answer, made = made[: len(asked.requests)], made[len(asked.requests) :]
                if not asked.answer.done():
                    asked.answer.set_result(answer)
        except (WorkerDiedError, WorkerHungError) as error:
            self._waiting.extendleft(reversed(calls))
            if rank not in self._dead and self.group.actors[rank] is actor:  # else its other calls have told of it
                self._bury(rank, error)
        except Exception as error:  # it belongs to those who wait, whatever it is
            self._call_failed(calls, error)
        finally:
            self.busy.add(-1)

    def _call_failed(self, calls: list[_Asked], error: Exception) -> None:
        if not isinstance(error, ComputeError):
            self._fail(calls, error)
        elif len(calls) == 1:
            self._fail(calls, GenerationError(str(error)))
        else:  # one of them may be at fault, and the others should not pay for it
            for asked in calls:
                asked.alone = True
            self._waiting.extendleft(reversed(calls))

    def _bury(self, rank: int, error: ComputeError) -> None:
        try:
            self._lost(rank, error)
        except ComputeError as final:
            self._fail(self._waiting, final)
        else:
            self._start(self._repairs, self._repair())

    def _lost(self, rank: int, error: ComputeError) -> None:
        """Count a death or a hang, of which it makes a death; raise where it may not be made good."""
        self.deaths += 1
        if self.send_weights is None or not self.group.replaceable:
            raise error
        if self.deaths > self.max_failures:
            raise type(error)(
                f"{error}\n{self.deaths} generators died or hung, rollout.max_failures is {self.max_failures}"
            )
        hung = isinstance(error, WorkerHungError)
        if hung:
            self.group.end(rank)
        what = "hung, is killed" if hung else "died"
        print(f"generator {rank} {what} and is replaced: {str(error).splitlines()[0]}", flush=True)
        self._dead.add(rank)

    async def _repair(self) -> None:
        assert self.send_weights is not None
        try:
            await self.send_weights()
        except Exception as error:  # it belongs to those who wait, whatever it is
            self._fail(self._waiting, error)

    def _fail(self, calls: Sequence[_Asked], error: Exception) -> None:
        for asked in calls:
            if not asked.answer.done():
                asked.answer.set_exception(error)
