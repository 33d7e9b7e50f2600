"""What the actors of a group reserve, and on which nodes they lie."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.errors import ComputeError

SPINS = "1000"
"""Looks that a thread takes at a barrier before it sleeps, in GNU's OpenMP, which torch has on Linux. By itself it
takes 300,000: where another program has the core of the thread that is waited for, nearly all time goes there."""

PLACE_S = 60.0
"""For a cluster that is up and has the room, seconds; it takes well under one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Reservations of each actor of one group; fractions are allowed."""

    cpus: float = 1
    gpus: float = 0
    threads: int = 1
    """Compute threads of each actor."""
    concurrency: int = 1
    """Calls that each actor takes at once, each in a thread of its own."""
    orchestrator: Literal["ray", "verl"] = "ray"
    """Who starts the actors and carries calls to them."""
    placement: Literal["PACK", "SPREAD"] | None = None
    """PACK puts ranks that talk much onto as few nodes as hold them, SPREAD onto as many as there are; either
    reserves for all ranks at once and numbers those of one node consecutively. None places each actor by itself."""


class Places:
    """The reserved places of `count` actors: Ray options for each rank, and its bundle of `group` if there is one."""

    def __init__(self, name: str, pool: Pool, count: int):
        """
        Raises:
            ComputeError: the cluster has no room for all of them.
        """
        self.group: Any = None
        self.bundles: list[int] = []
        self.options: list[dict[str, Any]] = [{"scheduling_strategy": "SPREAD"}] * count
        if (pool.placement and count > 1) or pool.orchestrator == "verl":
            self._reserve(name, pool, count)

    def _reserve(self, name: str, pool: Pool, count: int) -> None:
        from ray.util.placement_group import placement_group, placement_group_table
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        each = {key: amount for key, amount in (("CPU", pool.cpus), ("GPU", pool.gpus)) if amount}
        self.group = placement_group([each] * count, strategy=pool.placement or "PACK")
        if not self.group.wait(PLACE_S):
            self.release()
            raise ComputeError(f"{name}: no room for {count} actors of {each}; {_offered()}")
        self.bundles = by_node(placement_group_table(self.group)["bundles_to_node_id"])
        self.options = [
            {"scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle)}
            for bundle in self.bundles
        ]

    def release(self) -> None:
        """Give the places back; whatever still runs there is ended."""
        from ray.util.placement_group import remove_placement_group

        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None


def environment(pool: Pool) -> dict[str, str]:
    """Variables of an actor's process."""
    found = {
        "OMP_NUM_THREADS": str(pool.threads),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", SPINS),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),  # plug-ins import there as they do here
    }
    if not pool.gpus:
        found["CUDA_VISIBLE_DEVICES"] = ""  # Ray would leave the machine's GPUs in sight
    return found | {key: os.environ[key] for key in ("POSTTRAIN_FAULT",) if key in os.environ}


def by_node(nodes: Mapping[int, str]) -> list[int]:
    """Bundles (bundle -> node) in an order that keeps those of a node together, the node of bundle 0 first."""
    first: dict[str, int] = {}
    for bundle in sorted(nodes):
        first.setdefault(nodes[bundle], bundle)
    return sorted(nodes, key=lambda bundle: (first[nodes[bundle]], bundle))


def _offered() -> str:
    import ray

    free = ray.available_resources()
    return f"the cluster has {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free"
