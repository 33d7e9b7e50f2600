"""Saves and restores without Ray: what a policy's ranks and driver do, in this process."""

import time
from pathlib import Path

import torch
from torch import Tensor

from posttrain.compute.checkpoint import Checkpoints
from posttrain.compute.shard_file import read_parts
from posttrain.compute.snapshot import Snapshot

IDENTITY = {"config.lr": 0.1, "tokenizer": "t0"}


def checkpoints(uri, *, identity=IDENTITY, keep=2, **options) -> Checkpoints:
    return Checkpoints(str(uri), identity=identity, keep=keep, **options)


def tensors(step: int) -> dict[str, Tensor]:
    """A weight that tells its step, a moment of another dtype, and a scalar as AdamW keeps one."""
    return {
        "model.weight": torch.arange(8.0).reshape(4, 2) + step,
        "optimizer.weight.exp_avg": torch.arange(3).to(torch.bfloat16) + step,
        "optimizer.weight.step": torch.tensor(float(step)),
    }


def blank() -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, -1) for name, tensor in tensors(0).items()}


def state(step: int) -> dict:
    return {"step": step, "metrics": [{"loss": 0.1 + step}]}


def outcome_of(held: dict[str, Tensor], folder: str, *, rank: int = 0, ranks: int = 1) -> dict:
    """How the writing of one rank ended, of `ranks` that all hold `held`."""
    snapshot = Snapshot(rank=rank, world_size=ranks)
    snapshot.begin(held, folder)
    while (outcome := snapshot.result()) is None:
        time.sleep(0.001)  # the thread of the snapshot is at work
    return outcome


def reports_of(held: dict[str, Tensor], folder: str, ranks: int = 1) -> list[dict]:
    """What every rank reports to have written."""
    return [outcome_of(held, folder, rank=rank, ranks=ranks)["report"] for rank in range(ranks)]


def save_state(saved: Checkpoints, step: int, held: dict[str, Tensor], kept: dict, *, ranks: int = 1) -> None:
    """Commit any tensors and plain values, inside writing()."""
    attempt = saved.begin(step, 1000)
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    saved.commit(attempt, shapes=shapes, reports=reports_of(held, attempt.folder, ranks), state=kept)


def save(saved: Checkpoints, *steps: int, ranks: int = 1) -> None:
    """Save tensors() and state(), inside writing()."""
    for step in steps:
        if not saved.is_committed(step):
            save_state(saved, step, tensors(step), state(step), ranks=ranks)


def save_alone(uri: str, *steps: int, **options) -> None:
    """Save under a lease of its own."""
    with checkpoints(uri, **options).writing() as saved:
        save(saved, *steps)


def assert_is(found, step: int) -> None:
    assert found is not None and (found.step, found.state) == (step, state(step))
    held = blank()
    found.index.check_same(held, where=found.uri)
    read_parts(found.folder, found.index.stored(), held)
    for name, expected in tensors(step).items():
        assert held[name].dtype == expected.dtype and torch.equal(held[name], expected), name


def files_of(folder: Path) -> dict[str, bytes]:
    """The shards of a committed checkpoint on disk."""
    found = {path.name: path.read_bytes() for path in sorted(folder.glob("rank_*.safetensors"))}
    assert found, f"no shards in {folder}"
    return found
