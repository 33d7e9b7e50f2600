"""The one seam to the orchestration layer: named groups of actors, dispatch, deadlines, failures with a name.

Everything above this file calls a group's methods and never sees Ray.
"""

import asyncio
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from posttrain.compute.pool import Places, Pool, environment
from posttrain.compute.stacks import print_stacks, watched
from posttrain.compute.verl_workers import VerlWorkers
from posttrain.compute.whereabouts import Whereabouts, cause_of_death, end_process, last_words, whereabouts
from posttrain.deadline import DeadlineError, within
from posttrain.errors import ComputeError, PosttrainError, WorkerDiedError, WorkerHungError

GRACE_S = 3.0
"""For the death behind an error: peers of a dead rank may fail in a collective before Ray has told of the death."""


class ActorGroup:
    """`count` actors of one class, on resources of their own, called together.

    Args:
        name: what people read when one fails: "policy", "generator".
        cls: a plain class; its instances live in processes of their own.
        per_rank: keyword arguments of each instance.
        pool: what each reserves, and how they lie on the nodes.

    Raises:
        ComputeError: the cluster has no room for them.
    """

    def __init__(self, name: str, cls: type, per_rank: Sequence[dict[str, Any]], pool: Pool | None = None):
        self.name, self.pool = name, pool or Pool()
        self.places = Places(name, self.pool, len(per_rank))
        backend = VerlWorkers if self.pool.orchestrator == "verl" else RayActors
        self.members = backend(cls, per_rank, self.pool, self.places)
        self.actors = self.members.actors
        # Asked for now, because a dead or hung actor no longer answers.
        self._told = [each.__ray_call__.remote(whereabouts) for each in self.actors]
        self._stacks: asyncio.Task[str] | None = None
        self._watched = [each.__ray_call__.remote(watched) for each in self.actors]

    def __len__(self) -> int:
        return len(self.actors)

    async def call(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> list[Any]:
        """Call `method` with the same arguments on every actor; results in rank order.

        Raises:
            ComputeError: an actor died, or one did not answer in `timeout_s`. An error
                that the method raised itself is raised as it is.
        """
        return await self.call_each(method, [(args, kwargs)] * len(self.actors), timeout_s=timeout_s)

    async def call_each(
        self, method: str, arguments: Sequence[tuple[tuple, dict[str, Any]]], *, timeout_s: float
    ) -> list[Any]:
        """Call `method` on every actor with its own (args, kwargs).

        The first failure ends the wait, unless an actor turns out to have died: then that is the cause.
        """
        answers = self.members.submit_all(method, arguments)
        calls = [self._answer(rank, method, answer, timeout_s=timeout_s) for rank, answer in enumerate(answers)]
        return await first_cause(list(map(asyncio.ensure_future, calls)))

    async def call_one(self, rank: int, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        """Call `method` on one actor."""
        answer = self.members.submit(rank, method, args, kwargs)
        return await self._answer(rank, method, answer, timeout_s=timeout_s)

    def start(self, rank: int, method: str, *args: Any) -> Any:
        """Begin `method` on one actor and return a handle to its result, to pass to another group unread."""
        return self.members.submit(rank, method, args, {})

    @property
    def replaceable(self) -> bool:
        """Whether replace() works: verl's groups live and die as a whole."""
        return isinstance(self.members, RayActors)

    def end(self, rank: int) -> None:
        """Kill one actor, whatever it is at; its calls that are under way fail as those of one that died."""
        import ray

        if (where := self.where(rank)) is not None:
            end_process(where)
        ray.kill(self.actors[rank])  # pyright: ignore[reportArgumentType]

    def is_there(self, argument: Any) -> bool:
        """Whether an argument of a call could be passed: false of a handle whose result is not made yet."""
        import ray

        return not isinstance(argument, ray.ObjectRef) or bool(ray.wait([argument], timeout=0, fetch_local=False)[0])

    def replace(self, rank: int) -> None:
        """Put a new actor, made as the first was, where one has died; it knows nothing of what the first did."""
        assert isinstance(self.members, RayActors), "ask replaceable first"
        self.members.start(rank)
        self._told[rank] = self.actors[rank].__ray_call__.remote(whereabouts)
        self._watched[rank] = self.actors[rank].__ray_call__.remote(watched)

    def kill(self) -> None:
        """End every actor now, without running its exit handlers."""
        import ray

        for actor in self.actors:
            ray.kill(actor)  # pyright: ignore[reportArgumentType]
        self.places.release()

    @property
    def hosts(self) -> list[str]:
        """The machine of every rank."""
        return [where.host if (where := self.where(rank)) else "an unknown host" for rank in range(len(self))]

    def where(self, rank: int) -> Whereabouts | None:
        """Host, process and log of an actor; None if it never came up."""
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(self._told[rank], timeout=1.0)
        except RayError:
            return None

    def wait(self, rank: int, method: str, *args: Any, timeout_s: float) -> Any:
        """As call_one(), for a thread that has no event loop."""
        import ray
        from ray.exceptions import GetTimeoutError

        with self._named(rank, method):
            try:
                return ray.get(self.start(rank, method, *args), timeout=timeout_s)
            except GetTimeoutError:
                raise self._failed(rank, f": {method}() did not finish within {timeout_s:g} s") from None

    async def _answer(self, rank: int, method: str, answer: Any, *, timeout_s: float) -> Any:
        with self._named(rank, method):
            try:
                return await within(timeout_s, "", answer)
            except DeadlineError:
                if self._stacks is None or self._stacks.done():  # ranks that wait for each other are late together
                    self._stacks = asyncio.create_task(asyncio.to_thread(print_stacks, self.name, self._watched))
                late, stacks = f": {method}() did not finish within {timeout_s:g} s", await self._stacks
                raise self._failed(rank, late, stacks.strip(), kind=WorkerHungError) from None

    @contextmanager
    def _named(self, rank: int, method: str) -> Iterator[None]:
        """Turn Ray's errors into ours: an error of our own as it was raised, all else with the actor's name."""
        from ray.exceptions import RayActorError, RayError, RayTaskError

        try:
            yield
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, PosttrainError):
                raise cause from None
            raise self._failed(rank, f": {method}() raised {type(cause).__name__}: {cause}", str(error)) from None
        except RayActorError as error:
            raise self._failed(rank, f" died during {method}(): {_cause(str(error))}", kind=WorkerDiedError) from None
        except RayError as error:  # an object lost, a store full, an error that cannot be unpickled
            raise self._failed(rank, f": {method}(): {type(error).__name__}: {_cause(str(error))}") from None

    def _failed(self, rank: int, what: str, details: str = "", kind: type[ComputeError] = ComputeError) -> ComputeError:
        """The error of one actor: what happened, where, and the last lines of its log."""
        where = self.where(rank)
        if where is None:
            place, said = "it never came up, so its host and log are not known", ""
        else:
            place, said = f"host {where.host}, pid {where.pid}", last_words(where)
            details = details or (cause_of_death(where) if kind is WorkerDiedError else "")
        return kind("\n".join(part for part in (f"{self.name} {rank}{what} [{place}]", details, said) if part))


class RayActors:
    """Actors of Ray itself: the default backend."""

    def __init__(self, cls: type, per_rank: Sequence[dict[str, Any]], pool: Pool, places: Places):
        self.cls, self.per_rank, self.pool, self.places = cls, per_rank, pool, places
        self.actors: list[Any] = [None] * len(per_rank)
        for rank in range(len(per_rank)):
            self.start(rank)

    def start(self, rank: int) -> None:
        """Make the actor of one rank."""
        import ray

        pool = self.pool
        options = {
            "num_cpus": pool.cpus,
            "num_gpus": pool.gpus,
            "max_restarts": 0,
            "runtime_env": {"env_vars": environment(pool)},
        }
        if pool.concurrency > 1:
            options["max_concurrency"] = pool.concurrency
        actor = ray.remote(self.cls).options(**options, **self.places.options[rank])  # pyright: ignore[reportAttributeAccessIssue]
        self.actors[rank] = actor.remote(**self.per_rank[rank])

    def submit(self, rank: int, method: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Begin `method` on one actor; a handle to its result."""
        return getattr(self.actors[rank], method).remote(*args, **kwargs)

    def submit_all(self, method: str, arguments: Sequence[tuple[tuple, dict[str, Any]]]) -> list[Any]:
        """Begin `method` on all, each with its own arguments; handles in rank order."""
        return [self.submit(rank, method, args, kwargs) for rank, (args, kwargs) in enumerate(arguments)]


async def first_cause(calls: Sequence[asyncio.Future[Any]]) -> list[Any]:
    """Results in order; or raise the failure that explains the others: a death, else the first to come."""
    try:
        done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
        failures = [error for call in done if (error := call.exception())]
        if not failures:
            return [call.result() for call in calls]
        if not any(isinstance(error, WorkerDiedError) for error in failures):
            done, _ = await asyncio.wait(calls, timeout=GRACE_S)
            failures += [error for call in done if (error := call.exception()) and error not in failures]
        raise next((error for error in failures if isinstance(error, WorkerDiedError)), failures[0])
    finally:
        for call in calls:
            call.cancel()  # nobody waits for those that are not done


def _cause(message: str) -> str:
    """The telling line of Ray's report: the last of a traceback from the constructor, else the first."""
    lines = [line.strip() for line in re.sub(r"\x1b\[\d+m", "", message).splitlines() if line.strip()]
    return lines[-1] if "creation task" in lines[0] else lines[0]


def node_address() -> str:
    """The address of the machine that the calling actor runs on, as the other nodes know it."""
    import ray

    return ray.util.get_node_ip_address()
