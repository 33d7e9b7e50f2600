"""What a save costs training, and how long writing and reading take: the stall, the commit, the restore.

State of a model of the given size as AdamW keeps it: parameters and two moments in float32. The stall is the copy to
host memory, the second one of a run, whose buffers are there already; its bound is 1 % of the ten minutes between
saves. The baselines are torch.save and torch.load of the same tensors, without hashes and with training standing still.
Prints one JSON line per row and writes benchmarks/results/checkpoint.json.

    python benchmarks/checkpoint.py [--parameters 1.7e9] [--folder /tmp] [--device cuda] [--out FILE]
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from report import row, write

from posttrain.compute.checkpoint import Checkpoints
from posttrain.compute.shard_file import read_parts
from posttrain.compute.snapshot import Snapshot

INTERVAL_S = 600.0
"""Seconds between two saves by default: checkpoint.every_minutes."""
LAYERS = 28
"""Tensors of one kind; their number hardly matters, but one tensor alone would be cut into no jobs."""


def state_of(parameters: float, device: str) -> dict[str, torch.Tensor]:
    rows = int(parameters / LAYERS / 2048)
    kinds = ("model.layer{}.weight", "optimizer.layer{}.weight.exp_avg", "optimizer.layer{}.weight.exp_avg_sq")
    names = [kind.format(layer) for layer in range(LAYERS) for kind in kinds]
    return {name: torch.randn(rows, 2048, device=device) for name in names}


def seconds(start: float) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ours(state: dict[str, torch.Tensor], folder: Path) -> dict[str, float]:
    """Seconds of two saves and a restore; those of the second save count."""
    snapshot, found = Snapshot(rank=0, world_size=1), {}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    size = sum(tensor.nbytes for tensor in state.values())
    with Checkpoints(str(folder / "ours"), identity={}, keep=1).writing() as saved:
        for step in (1, 2):
            attempt = saved.begin(step, size)
            start = time.perf_counter()
            snapshot.begin(state, attempt.folder)
            found["stall"] = seconds(start)
            while (outcome := snapshot.result()) is None:
                continue
            saved.commit(attempt, shapes=shapes, reports=[outcome["report"]], state={})
            found["save"] = seconds(start)
        newest = saved.latest()
        assert newest is not None, "just saved"
        read = {name: torch.empty_like(tensor) for name, tensor in state.items()}
        start = time.perf_counter()
        read_parts(newest.folder, newest.index.stored(), read)
        found["restore"] = seconds(start)
        assert all(torch.equal(read[name], tensor) for name, tensor in state.items()), "restored bit by bit"
    return found


def theirs(state: dict[str, torch.Tensor], folder: Path) -> dict[str, float]:
    """torch.save and torch.load, the file made durable."""
    start = time.perf_counter()
    with open(folder / "theirs.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    save = seconds(start)
    start = time.perf_counter()
    torch.load(folder / "theirs.pt", map_location=next(iter(state.values())).device)
    return {"stall": save, "save": save, "restore": seconds(start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", type=float, default=1.7e9)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    state = state_of(options.parameters, options.device)
    gb = sum(tensor.nbytes for tensor in state.values()) / 1e9
    workload = f"AdamW state of {options.parameters / 1e9:.3g} B parameters, {gb:.3g} GB on {options.device}, one rank"
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        mine, peer = ours(state, Path(name)), theirs(state, Path(name))
    rows = [
        row("checkpoint", workload, ours=mine[each], baseline=peer[each], unit=f"s {what}", gb=round(gb, 3), **more)
        for each, what, more in (
            ("stall", "of standing still a save", {"share_of_interval": round(mine["stall"] / INTERVAL_S, 6)}),
            ("save", "until committed and read back", {}),
            ("restore", "to read and prove", {}),
        )
    ]
    write("checkpoint", rows, options.out)


if __name__ == "__main__":
    main()
