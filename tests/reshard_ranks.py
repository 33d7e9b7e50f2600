"""Ranks of one world over gloo that restore a checkpoint, look at it, and save it again under another sharding.

python reshard_ranks.py ROOT STEP WORLD HOW: WORLD processes read the newest checkpoint below ROOT, if there is one,
into tensors sharded as HOW says, and save them as step STEP. The first makes them from the names alone.
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from posttrain.compute.committed import open_checkpoint
from posttrain.compute.shard_file import read_parts
from posttrain.compute.snapshot import Snapshot
from saves import checkpoints

SHAPES = {"model.a": (7, 6), "model.b": (5,), "model.c": (3, 4, 5), "optimizer.a.exp_avg": (7, 6), "model.s": ()}
"""Sizes that no world divides, and a scalar."""

HOW = {
    "whole": ((), []),
    "rows": ((-1,), [Shard(0)]),
    "columns": ((-1,), [Shard(-1)]),
    "grid": ((-1, 2), [Shard(0), Shard(-1)]),
    "hybrid": ((-1, 2), [Replicate(), Shard(0)]),
    "cube": ((-1, 2, 2), [Replicate(), Shard(0), Shard(-1)]),
}
"""Sizes of the mesh's dimensions, -1 for what is left, and the placements of every tensor on it."""


def values() -> dict[str, torch.Tensor]:
    """What is stored: of every tensor a sequence of its own, the last bits used."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def sharded(whole: dict[str, torch.Tensor], how: str, world: int) -> dict[str, torch.Tensor]:
    if how in ("fsdp", "fsdp+tp"):
        return fsdp(whole, world, tp=how == "fsdp+tp")
    sizes, placements = HOW[how]
    if not sizes:
        return {name: tensor.clone() for name, tensor in whole.items()}
    others = torch.Size(size for size in sizes if size > 0).numel()
    mesh = init_device_mesh("cpu", tuple(world // others if size < 0 else size for size in sizes))
    found = {}
    for name, tensor in whole.items():
        spread = [Shard(p.dim % tensor.ndim) if isinstance(p, Shard) and tensor.ndim else p for p in placements]
        if tensor.ndim == 1:  # a dimension is sharded once here
            spread = [*[Replicate()] * (len(spread) - 1), spread[-1]]
        found[name] = distribute_tensor(tensor, mesh, spread) if tensor.ndim else tensor.clone()
    return found


def fsdp(whole: dict[str, torch.Tensor], world: int, *, tp: bool) -> dict[str, torch.Tensor]:
    """As FSDP2 itself shards parameters, over tensor parallelism by rows where asked: strided shards."""
    mesh = init_device_mesh("cpu", (world // 2, 2) if tp else (world,), mesh_dim_names=("dp", "tp") if tp else ("dp",))
    module = torch.nn.Module()
    names = {}
    for number, (name, tensor) in enumerate(whole.items()):
        if tensor.ndim:
            value = distribute_tensor(tensor, mesh["tp"], [Shard(0)]) if tp else tensor.clone()
            module.register_parameter(f"p{number}", torch.nn.Parameter(value))
            names[name] = f"p{number}"
    fully_shard(module, mesh=mesh["dp"] if tp else mesh)
    parameters = dict(module.named_parameters())
    return {name: parameters[names[name]] if name in names else whole[name].clone() for name in whole}


def be_rank(rank: int, root: str, step: int, world: int, how: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root}/store{step}", rank=rank, world_size=world)
    newest = checkpoints(f"{root}/saved").latest()
    start = values() if newest is None else {name: torch.full(shape, torch.nan) for name, shape in SHAPES.items()}
    held = sharded(start, how, world)
    if newest is not None:
        newest.index.check_same(held, where=newest.uri)
        read_parts(newest.folder, newest.index.stored(), held)
    for name, expected in values().items():
        tensor = held[name].detach()
        found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(found, expected), f"rank {rank} of {world} ({how}) reads {name} differently"
    snapshot = Snapshot(rank=rank, world_size=world)
    snapshot.begin(held, f"{root}/ranks{step}")
    while (outcome := snapshot.result()) is None:
        time.sleep(0.001)  # the thread of the snapshot is at work
    dist.barrier()
    Path(f"{root}/report{step}.{rank}").write_text(json.dumps(outcome["report"]))
    dist.destroy_process_group()


def main(root: str, *plan: str) -> None:
    """PLAN is a list of WORLD:HOW, one save after another."""
    for step, each in enumerate(plan, start=1):
        world, how = each.split(":")
        fork = multiprocessing.get_context("fork")  # importing torch takes seconds
        ranks = [fork.Process(target=be_rank, args=(r, root, step, int(world), how)) for r in range(int(world))]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert [rank.exitcode for rank in ranks] == [0] * len(ranks), f"save {step}, {each}"
        commit(root, step, int(world))
        print(each, sorted(open_checkpoint(f"{root}/saved/step_{step:06d}").index.files), flush=True)


def commit(root: str, step: int, world: int) -> None:
    reports = [json.loads(Path(f"{root}/report{step}.{rank}").read_text()) for rank in range(world)]
    with checkpoints(f"{root}/saved").writing() as saved:
        attempt = saved.begin(step, 1)
        os.rename(f"{root}/ranks{step}", attempt.folder)
        saved.commit(attempt, shapes=SHAPES, reports=reports, state={})


if __name__ == "__main__":
    main(sys.argv[1], *sys.argv[2:])
