"""A whole GRPO run with vLLM on one GPU: does a model that was warmed up there learn the generated task?

The steps of the flow (warm-up, grpo, evaluate) on the task of configs/grpo_tiny.yaml, with a larger Qwen3 drawn at
random and vLLM as the generator on the policy's GPU. The baseline is the model after the warm-up, on the same held-out
rows and sampling noise. The row has the curves: reward, held-out reward, difference of the two engines' logprobs,
seconds by phase.

    VLLM_USE_FLASHINFER_SAMPLER=0 python -m benchmarks.grpo_vllm [--steps 60] [--engines 1] [--out FILE]
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import row, write
from benchmarks.rl_learning import Start

CURVES = ("reward/mean", "eval/reward", "policy/mismatch_abs", "policy/mismatch_kl", "policy/entropy")
SHAPE = {"hidden_size": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4}
"""Heads of 64: vLLM's kernels on GPUs serve none below 32."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of GRPO")
    parser.add_argument("--warmup", type=int, default=120, help="steps before it")
    parser.add_argument("--prompts", type=int, default=64, help="groups of a step")
    parser.add_argument("--gpus", type=int, default=1, help="0 tries the script on a CPU")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--shape", type=json.loads, default=SHAPE, help="model.fresh, as JSON")
    parser.add_argument("--out")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    common: dict[str, Any] = {
        "model.fresh": options.shape,
        "parallel.gpus_per_node": options.gpus,
        "parallel.data": 1,
        "rollout.generator": "vllm",
        "rollout.generators": options.engines,
        "rollout.prompts_per_step": options.prompts,
        "warmup.num_steps": options.warmup,
        "optim.num_steps": options.steps,
        "checkpoint.every_steps": options.steps,
    }
    with tempfile.TemporaryDirectory() as folder:
        start = Start(Path(folder), 0, common)
        found = start.run("run", {})
    steps = start.metrics
    curves = {name: [[n, round(step[name], 6)] for n, step in enumerate(steps, 1) if name in step] for name in CURVES}
    phases = [name for name in steps[1] if name.startswith("time/")]
    times = {name: round(median(step.get(name, 0.0) for step in steps), 4) for name in phases}
    what = f"configs/grpo_tiny.yaml with {json.dumps(common)}"
    write(
        "grpo_vllm",
        [
            row(
                "grpo_vllm", what, ours=found["after"], baseline=found["before"], unit="held-out reward, sampled",
                curves=curves, median_s=times, staleness_mean=found["staleness_mean"],
            )
        ],
        options.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
