"""What the RL loop costs beside sampling and training, and whether it holds on to memory.

The flow's own train step on a generator without a model. One row: 64 streams that answer after 5 s each, so that
sampling takes a time that is known, and everything a step takes beyond it and beyond the policy's own work is the
loop's: hand-out of requests, answers, rewards, batches, ledger, metrics. Other row: 10,000 rollouts a step that are
answered at once, and the resident memory of the driver from its second step on. Prints a JSON line a row and writes
benchmarks/results/controller_overhead.json.

    python benchmarks/controller_overhead.py [--steps 5] [--out FILE]
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from inputs import prepared
from report import versions, write

from posttrain.compute.generator.stub import StubGenerator
from posttrain.config_file import load_config
from steps.grpo import grpo

ROOT = Path(__file__).resolve().parent.parent
STREAMS = StubGenerator.concurrency - 1
CALL_S = 5.0
GROUP_SIZE = 8
POLICY = ("prepare", "forward", "backward", "reduce", "optimizer", "sync", "eval", "checkpoint")
"""Phases of a step that are not the loop's."""


class FiveSeconds(StubGenerator):
    """Each call takes CALL_S."""

    seconds = CALL_S


class Memory:
    """An observer that notes the driver's resident memory after every step, MiB."""

    def __init__(self) -> None:
        self.mib: list[float] = []

    def restore(self, history) -> None:
        """Nothing: a run of this benchmark begins anew."""

    def step(self, metrics) -> None:
        self.mib.append(psutil.Process().memory_info().rss / 2**20)

    def rollouts(self, step, groups, dropped=()) -> None:
        """Nothing: the loop's own memory is measured."""

    def note(self, text) -> None:
        """Nothing, as above."""


def train(folder: str, *, generator: str, groups: int, steps: int) -> tuple[list[dict[str, float]], list[float]]:
    """Metrics of every step, and the driver's memory after it."""
    overrides: dict[str, Any] = {
        "base": str(ROOT / "configs" / "grpo_tiny.yaml"),
        "model.fresh": {"hidden_size": 32, "num_layers": 1},
        "warmup": None,
        "data.sources": None,
        "optim.num_steps": steps,
        "method.kl_coef": None,
        "parallel.data": 1,
        "rollout.generator": generator,
        "rollout.prompts_per_step": groups,
        "eval.every_steps": 1000,
        "checkpoint.every_steps": 1000,
    }
    config = load_config(json.dumps(overrides))
    memory = Memory()
    result = grpo(config, **prepared(config, folder).plain(), observers=[memory])
    assert result is not None
    return [json.loads(line) for line in Path(result["metrics"]).read_text().splitlines()], memory.mib


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    same = {
        "benchmark": "controller_overhead",
        "hardware": f"{os.cpu_count()} CPU cores, load average {os.getloadavg()[0]:.1f} at the start",
        "versions": versions("torch", "ray"),
    }
    with tempfile.TemporaryDirectory() as folder:
        groups = 2 * STREAMS
        rows, _ = train(folder, generator="controller_overhead:FiveSeconds", groups=groups, steps=options.steps)
    sampling_s = groups / STREAMS * CALL_S
    steps_s = [row["time/step_s"] for row in rows[1:-1]]  # the first starts processes, the last evaluates
    policy_s = [sum(row.get(f"time/{name}_s", 0.0) for name in POLICY) for row in rows[1:-1]]
    shares = [(step - sampling_s - policy) / step for step, policy in zip(steps_s, policy_s, strict=True)]
    overhead = {
        **same,
        "workload": f"{STREAMS} streams of {CALL_S:g} s a call, {groups} groups of {GROUP_SIZE} a step, each rewarded",
        "ours": round(100 * median(shares), 2),
        "baseline": 2.0,
        "ratio": round(2.0 / (100 * median(shares)), 3),
        "unit": "% of a step's time that is neither sampling nor the policy's work (baseline: the bound)",
        "step_s": round(median(steps_s), 3),
        "all": [round(100 * share, 2) for share in shares],
    }
    with tempfile.TemporaryDirectory() as folder:
        stub = "posttrain.compute.generator.stub:StubGenerator"
        rows, mib = train(folder, generator=stub, groups=1250, steps=options.steps)
    rate = median(1250 * GROUP_SIZE / (row["time/generate_s"] + row["time/reward_s"]) for row in rows)
    memory = {
        **same,
        "workload": f"1250 groups of {GROUP_SIZE} a step, answered at once, {options.steps} steps",
        "ours": round((mib[-1] - mib[1]) / (len(mib) - 2), 2),
        "baseline": None,
        "ratio": None,
        "unit": "MiB a step that the driver's resident memory grows by, from its second step on",
        "rollouts_per_s": round(rate),
        "resident_mib": [round(each) for each in mib],
    }
    write("controller_overhead", [overhead, memory], options.out)


if __name__ == "__main__":
    main()
