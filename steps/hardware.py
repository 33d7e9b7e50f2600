"""From the config's `parallel` to what each actor group reserves."""

import os
from dataclasses import dataclass
from math import gcd

from posttrain.compute.mesh import Sizes
from posttrain.compute.pool import Pool
from posttrain.config import Parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Reservations of one train step; on CPU they are Ray's bookkeeping, on GPUs they pick the devices."""

    cluster: dict[str, int]
    """What each node offers Ray."""
    policy: Pool
    generator: Pool
    shared: int
    """Generators beside each policy rank, on its GPU; 0 where they have their own, or there is none."""
    sizes: Sizes
    """Of the policy's mesh."""
    sizes_on_one_node: Sizes
    """Of a step that runs on a single node, whatever `parallel.nodes` is."""
    data_workers: int
    """CPU actors that tokenise and pack ahead; 0 leaves that to a thread of the driver."""


def hardware(parallel: Parallel, generators: int = 1, *, gpus_each: int = 1) -> Hardware:
    """One rule for a laptop and for N GPUs.

    With a GPU to spare for each, generators get their own; otherwise as many share that of each policy
    rank, and rank and generators take turns. On CPU the ranks split the cores, and the generators, which
    work while the ranks wait, use all of them.
    """
    local = parallel.backend == "local"
    cores = (os.cpu_count() or 1) if local else parallel.cpus_per_node
    gpus = parallel.gpus_per_node
    ranks_per_node = -(-parallel.ranks // parallel.nodes)
    alone = parallel.gpus >= parallel.ranks + generators * gpus_each
    beside = -(-generators // parallel.ranks) if gpus and not alone else 0
    # One worker makes 0.6 M tokens/s and more (benchmarks/tokenize_pack.py); a GPU trains a 0.6B model at 0.1 M.
    workers = -(-gpus // 4)
    return Hardware(
        cluster={"num_cpus": max(cores, ranks_per_node + generators + workers), "num_gpus": gpus},
        policy=Pool(
            gpus=0 if not gpus else 1 if alone else 0.6,
            threads=max(1, cores // ranks_per_node),
            orchestrator=parallel.orchestrator,
            placement="PACK" if gpus else "SPREAD",  # GPUs of a node talk over NVLink; cores are for sharing the work
        ),
        generator=Pool(
            gpus=0 if not gpus else gpus_each if alone else int(4000 / beside) / 10_000,  # Ray counts in 1/10,000
            threads=cores,
            orchestrator=parallel.orchestrator,
        ),
        shared=beside,
        sizes=Sizes(data=parallel.data_ranks, context=parallel.context, tensor=parallel.tensor, expert=parallel.expert),
        sizes_on_one_node=_on_one_node(parallel),
        data_workers=workers,
    )


def _on_one_node(parallel: Parallel) -> Sizes:
    """Fewer data ranks where one node has not the GPUs, and experts shared among as many of them as divide both."""
    data = min(parallel.data_ranks, parallel.gpus_per_node // parallel.ranks_per_pack or parallel.data_ranks)
    expert = gcd(data, parallel.expert)
    return Sizes(data=data, context=parallel.context, tensor=parallel.tensor, expert=expert)
