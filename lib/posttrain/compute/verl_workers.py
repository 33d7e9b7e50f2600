"""The second backend of ActorGroup: the actors are workers of verl's single_controller, and verl carries the calls.

Written against verl 0.9.1, whose names and signatures here have not changed since 0.7.1. Only
RayWorkerGroup, its pool and its dispatch are used; it is installed without its dependencies
(`make test-verl`). Deadlines and the reports of failures are ActorGroup's: verl has neither.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

from posttrain.compute.pool import Places, Pool, environment

INSTALL = "pip install 'tensordict>=0.10,<0.16' omegaconf && pip install --no-deps verl==0.9.1"
"""verl's own requirements cap transformers and bring a trainer's dependencies; this much runs what is used here."""


def verl_is_installed() -> bool:
    """Whether verl can be imported, found without importing it."""
    return importlib.util.find_spec("verl") is not None


class VerlWorkers:
    """Workers of one RayWorkerGroup, each around an instance of a plain class."""

    def __init__(self, cls: type, per_rank: Sequence[dict[str, Any]], pool: Pool, places: Places):
        import ray
        from verl.single_controller.ray import (  # pyright: ignore[reportMissingImports]
            RayClassWithInitArgs,
            RayResourcePool,
            RayWorkerGroup,
        )

        class Ordered(RayClassWithInitArgs):
            """verl takes bundles as they come; ours are numbered so that the ranks of a node are consecutive."""

            def __call__(self, placement_group: Any, placement_group_bundle_idx: int, **options: Any) -> Any:
                return super().__call__(placement_group, places.bundles[placement_group_bundle_idx], **options)

        count = len(per_rank)
        reserved = RayResourcePool(process_on_nodes=[count], use_gpu=pool.gpus > 0)
        reserved.pgs = [places.group]  # made already: verl would wait for room without a deadline
        if pool.gpus:
            reserved.max_colocate_count = 1 / pool.gpus  # verl's way to say what share of a GPU a worker takes
        made = Ordered(ray.remote(_host()), cls, list(per_rank))
        made.update_options({"num_cpus": pool.cpus, "max_restarts": 0, "max_concurrency": pool.concurrency})
        self.group = RayWorkerGroup(
            reserved,
            made,
            device_name="cuda" if pool.gpus else "cpu",
            worker_env=environment(pool),
            # Unused: the ranks meet at an address that rank 0 holds open. verl would look for a free port and let go.
            master_addr="127.0.0.1",
            master_port="0",
        )
        self.actors = self.group.workers

    def submit(self, rank: int, method: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Begin `method` on one worker; a handle to its result."""
        return self.actors[rank].run.remote(method, *args, **kwargs)

    def submit_all(self, method: str, arguments: Sequence[tuple[tuple, dict[str, Any]]]) -> list[Any]:
        """Begin `method` on all, each with its own arguments; handles in rank order."""
        # verl deals a list of as many elements as workers out, one each; anything else it repeats.
        columns = [list(column) for column in zip(*(args for args, _ in arguments), strict=True)]
        named = {key: [kwargs[key] for _, kwargs in arguments] for key in arguments[0][1]}
        return self.group.run([method] * len(arguments), *columns, **named)


def _host() -> type:
    """A verl worker that holds an instance of ours; made here, since its base class is verl's."""
    from verl.single_controller.base import Worker  # pyright: ignore[reportMissingImports]
    from verl.single_controller.base.decorator import Dispatch, register  # pyright: ignore[reportMissingImports]

    class Host(Worker):
        def __init__(self, cls: type, per_rank: list[dict[str, Any]]):
            super().__init__()
            self.held = cls(**per_rank[self.rank])

        @register(dispatch_mode=Dispatch.ALL_TO_ALL, blocking=False)
        def run(self, method: str, *args: Any, **kwargs: Any) -> Any:
            return getattr(self.held, method)(*args, **kwargs)

    return Host
