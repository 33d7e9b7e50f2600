"""The one seam to the orchestration layer: named groups of actors, dispatch, deadlines, failures with a name.

Everything above this file calls a group's methods and never sees Ray.
"""

import asyncio
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from posttrain.compute.stacks import print_stacks, watched
from posttrain.deadline import DeadlineError, within
from posttrain.errors import ComputeError, PosttrainError


class ActorGroup:
    """`count` actors of one class, on resources of their own, called together.

    Args:
        name: what people read when one fails: "policy", "generator".
        cls: a plain class; its instances live in processes of their own.
        per_rank: keyword arguments of each instance.
        num_cpus, num_gpus: reserved for each actor, fractions allowed.
        threads: compute threads of each actor.
    """

    def __init__(
        self,
        name: str,
        cls: type,
        per_rank: Sequence[dict[str, Any]],
        *,
        num_cpus: float,
        num_gpus: float = 0,
        threads: int = 1,
    ):
        import ray

        self.name = name
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),  # plug-ins import there as they do here
        }
        if not num_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # Ray would leave the machine's GPUs in sight
        environment |= {key: os.environ[key] for key in ("POSTTRAIN_FAULT",) if key in os.environ}
        actor = ray.remote(cls).options(  # pyright: ignore[reportAttributeAccessIssue]
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_restarts=0,
            runtime_env={"env_vars": environment},
            scheduling_strategy="SPREAD",
        )
        self.actors = [actor.remote(**arguments) for arguments in per_rank]
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
        """Call `method` on every actor with its own (args, kwargs); the first failure ends the wait."""
        calls = [
            self._one(rank, method, args, kwargs, timeout_s=timeout_s) for rank, (args, kwargs) in enumerate(arguments)
        ]
        return list(await asyncio.gather(*calls))

    async def call_one(self, rank: int, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        """Call `method` on one actor."""
        return await self._one(rank, method, args, kwargs, timeout_s=timeout_s)

    def start(self, rank: int, method: str, *args: Any) -> Any:
        """Begin `method` on one actor and return a handle to its result, to pass to another group unread."""
        return getattr(self.actors[rank], method).remote(*args)

    def kill(self) -> None:
        """End every actor now, without running its exit handlers."""
        import ray

        for actor in self.actors:
            ray.kill(actor)  # pyright: ignore[reportArgumentType]

    def wait(self, rank: int, method: str, *args: Any, timeout_s: float) -> Any:
        """As call_one(), for a thread that has no event loop."""
        import ray
        from ray.exceptions import GetTimeoutError

        with _named(f"{self.name} {rank}", method):
            try:
                return ray.get(self.start(rank, method, *args), timeout=timeout_s)
            except GetTimeoutError:
                raise ComputeError(f"{self.name} {rank}: {method}() did not finish within {timeout_s:g} s") from None

    async def _one(self, rank: int, method: str, args: tuple, kwargs: dict[str, Any], *, timeout_s: float) -> Any:
        who = f"{self.name} {rank}"
        with _named(who, method):
            reference = getattr(self.actors[rank], method).remote(*args, **kwargs)
            try:
                return await within(timeout_s, f"{who}: {method}()", reference)
            except DeadlineError as error:
                if self._stacks is None or self._stacks.done():  # ranks that wait for each other are late together
                    self._stacks = asyncio.create_task(asyncio.to_thread(print_stacks, self.name, self._watched))
                raise ComputeError(f"{error}{await self._stacks}") from None


@contextmanager
def _named(who: str, method: str) -> Iterator[None]:
    """Turn Ray's errors into ours: an error of our own as it was raised, all else with the actor's name."""
    from ray.exceptions import RayActorError, RayError, RayTaskError

    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, PosttrainError):
            raise cause from None
        raise ComputeError(f"{who}: {method}() raised {type(cause).__name__}: {cause}\n{error}") from None
    except RayActorError as error:
        raise ComputeError(f"{who} died during {method}(): {_cause(str(error))}") from None
    except RayError as error:  # an object lost, a store full, an error that cannot be unpickled
        raise ComputeError(f"{who}: {method}(): {type(error).__name__}: {_cause(str(error))}") from None


def _cause(message: str) -> str:
    """The telling line of Ray's report: the last of a traceback from the constructor, else the first."""
    lines = [line.strip() for line in re.sub(r"\x1b\[\d+m", "", message).splitlines() if line.strip()]
    return lines[-1] if "creation task" in lines[0] else lines[0]


def node_address() -> str:
    """The address of the machine that the calling actor runs on, as the other nodes know it."""
    import ray

    return ray.util.get_node_ip_address()
