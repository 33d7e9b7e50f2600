"""A whole GRPO step on one GPU: generate, pack, train, sync with proof; beside TRL's trainer with vLLM colocated.

Random Qwen3-shaped weights in bfloat16, prompts of random tokens, every completion of full length, rewards by chance,
no Ray: a policy rank in this process, vLLM engines in others on the same GPU, buckets by CUDA IPC between them (on a
CPU, where one engine tries the script, by broadcast). TRL's side is its own GRPOTrainer in a process of its own, on as
many rollouts of the same lengths, bfloat16, beta 0, with the kernels that it chooses by itself unless --attention names
others. The phases of our step add up to it. With --apart both sides run at once, each with a GPU and half of the cores
of one host.

    VLLM_USE_FLASHINFER_SAMPLER=0 python -m benchmarks.grpo_step [--size 0.6b] [--rollouts 128 512] [--apart]
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.engine_process import EngineProcess, together
from benchmarks.report import row, write
from benchmarks.shapes import SIZES
from benchmarks.trl_grpo import MEMORY_SHARE, run_trl


def run_ours(options: argparse.Namespace) -> dict[int, list[dict[str, Any]]]:
    """Rollouts a step -> seconds of every step by phase, and what the trainer measured."""
    import torch

    from benchmarks.fsdp_scaling import write_model
    from posttrain.compute.collective import MeetingPoint
    from posttrain.compute.mesh import Sizes
    from posttrain.workflow.policy_rank import PolicyRank
    from posttrain.workflow.training import Training

    device, longest = "cuda" if torch.cuda.is_available() else "cpu", options.prompt + options.new
    assert options.pack_tokens >= longest, "a rollout must fit in a pack"
    for rollouts in options.rollouts:
        assert rollouts % (options.group * options.engines) == 0, "engines get equal shares of whole groups"
    with tempfile.TemporaryDirectory() as folder:
        uri = write_model(Path(folder), options.size, device)
        training = Training(
            num_steps=1000,
            lr=1e-6,
            schedule="constant",
            warmup_steps=0,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            max_grad_norm=1.0,
            pack_tokens=options.pack_tokens,
            precision=options.precision,
        )
        one = {"rank": 0, "sizes": Sizes(data=1), "model_uri": uri, "backend": "posttrain", "reference": False}
        rank = PolicyRank(**one, training=training)
        rank.meeting = MeetingPoint("127.0.0.1")
        costs = rank.join(rank.meeting.address, 600.0)
        named: dict[str, Any] = {"model_uri": uri, "stop_ids": (), "pad_id": 0, "max_tokens": longest}
        named |= {"memory_share": MEMORY_SHARE / options.engines, "can_sleep": options.sleep}
        engines = [EngineProcess(**named) for _ in range(options.engines)]
        sync = Sync(rank, engines, shared=device == "cuda")
        sync.push(0)
    found: dict[int, list[dict[str, Any]]] = {}
    for n, rollouts in enumerate(options.rollouts):
        numbers = range(n * (options.steps + 1), (n + 1) * (options.steps + 1))
        found[rollouts] = [one_step(options, step, rollouts, rank, engines, sync, costs) for step in numbers]
    for engine in engines:
        engine.close()
    return found


class Sync:
    """What workflow/weight_push.py does through Ray, for one rank and its engines."""

    def __init__(self, rank: Any, engines: list[EngineProcess], *, shared: bool):
        self.rank, self.engines, self.handle = rank, engines, None
        self.dtype = engines[0].call("weight_dtype")
        if shared:
            assert {rank.sender("gpu")} == set(together(engines, "gpu"))
            self.handle = rank.sender("handle")
        else:
            engines[0].start("join", rank.sender("meet", "127.0.0.1"), 1, 2, 300.0)
            rank.sender("join", world_size=2, timeout_s=300.0)
            engines[0].result()

    def push(self, version: int) -> None:
        together(self.engines, "begin_sync", version)
        self.rank.sender("start", self.dtype)
        while packed := self.rank.sender("fill"):
            for engine in self.engines:
                engine.start("load_bucket", packed, self.handle)
            if self.handle is None:
                self.rank.sender("send")
            for engine in self.engines:
                engine.result()
        sent = self.rank.weights_digest(self.dtype)
        for held in together(self.engines, "end_sync"):
            assert held == sent, f"an engine holds {held[:12]}, the policy sent {sent[:12]}"


def one_step(
    options: argparse.Namespace,
    step: int,
    rollouts: int,
    rank: Any,
    engines: list[EngineProcess],
    sync: Sync,
    costs: Any,
) -> dict[str, Any]:
    """Seconds by phase; the first of all steps compiles."""
    import torch

    from posttrain.compute.generator import Request
    from posttrain.config_method import GRPO
    from posttrain.data.advantage import centered
    from posttrain.data.pack import fill, pack
    from posttrain.data.rollout import group_units, request_seed
    from posttrain.data.types import Prompt, Rollout
    from posttrain.model.losses import count
    from posttrain.model.losses.policy_gradient import TruncatedLoss

    rng, vocab, prompts = random.Random(step), SIZES[options.size][-1], rollouts // options.group
    asked = [
        Prompt(uid=n, token_ids=tuple(rng.choices(range(vocab), k=options.prompt)), row={}) for n in range(prompts)
    ]
    requests = [
        Request(
            token_ids=p.token_ids, seed=request_seed(step, p.uid, s, 0), temperature=1.0, max_new_tokens=options.new
        )
        for p in asked
        for s in range(options.group)
    ]
    marks = [time.perf_counter()]
    share = len(requests) // len(engines)
    for n, engine in enumerate(engines):
        engine.start("generate", requests[n * share : (n + 1) * share])
    made = [completion for engine in engines for completion in engine.result()]
    marks.append(time.perf_counter())
    units = []
    for n, prompt in enumerate(asked):
        few = made[n * options.group : (n + 1) * options.group]
        names = ("token_ids", "logprobs", "versions", "finish_reason")
        group = [
            Rollout(prompt=prompt, sample_index=s, **{name: getattr(c, name) for name in names})
            for s, c in enumerate(few)
        ]
        units += group_units(group, *centered([[rng.random() for _ in few]]))
    packs = pack(units, pack_tokens=options.pack_tokens)
    loss = TruncatedLoss(importance_cap=GRPO().importance_cap, temperature=1.0)
    denominator = count(loss, packs)
    marks.append(time.perf_counter())
    if options.sleep:
        together(engines, "sleep")
    metrics = rank.train_step(step, packs, loss, denominator)
    marks.append(time.perf_counter())
    sync.push(step + 1)
    marks.append(time.perf_counter())
    phases = ("generate", "pack", "train", "sync")
    found = {f"{name}_s": end - start for name, (start, end) in zip(phases, pairwise(marks), strict=True)}
    seconds = sum(metrics.get(f"time/{name}_s", 0.0) for name in ("forward", "backward", "reduce", "optimizer"))
    trained = costs.metrics(packs, seconds, ranks=1, pack_tokens=options.pack_tokens)
    kept = ("mismatch_kl", "mismatch_abs", "grad_norm", "loss")
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {
        "step_s": marks[-1] - marks[0],
        **found,
        "policy_peak_gib": round(peak, 2),
        "tokens": sum(len(c.token_ids) for c in made),
        "fill": fill(packs, pack_tokens=options.pack_tokens),
        **{name: value for name, value in metrics.items() if name.startswith("time/") or name in kept},
        **trained,
    }


def measured(side: str, rollouts: list[int], gpu: str | None, timeout_s: float) -> dict[int, list[dict[str, Any]]]:
    """One side in a process of its own, by the arguments of this one."""
    command = [sys.executable, "-m", "benchmarks.grpo_step", *sys.argv[1:], "--side", side]
    command += ["--rollouts", *map(str, rollouts)]  # the last one counts
    env = dict(os.environ)
    if gpu is not None:
        cores = sorted(os.sched_getaffinity(0))
        half = cores[: len(cores) // 2] if gpu == "0" else cores[len(cores) // 2 :]
        command = ["taskset", "-c", ",".join(map(str, half)), *command]
        env["CUDA_VISIBLE_DEVICES"] = gpu
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=timeout_s, check=True, env=env)
    return {int(n): steps for n, steps in json.loads(ran.stdout.strip().splitlines()[-1]).items()}


def both(options: argparse.Namespace) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Side -> rollouts -> steps: ours in one process, TRL in one for each number of rollouts."""
    parts = [("ours", options.rollouts)]
    parts += [] if options.no_baseline else [("trl", [rollouts]) for rollouts in options.rollouts]
    gpus = {"ours": "0", "trl": "1"} if options.apart else {}
    found: dict[str, dict[int, list[dict[str, Any]]]] = {"ours": {}, "trl": {}}

    def measure(side: str) -> None:
        for name, rollouts in parts:
            if name == side:
                found[side] |= measured(side, rollouts, gpus.get(side), options.timeout)

    with ThreadPoolExecutor(2 if options.apart else 1) as pool:
        for done in [pool.submit(measure, side) for side in found]:
            done.result()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.6b", choices=SIZES)
    parser.add_argument("--rollouts", type=int, nargs="+", default=[128], help="a step; a row each")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=512, help="tokens of a completion")
    parser.add_argument("--steps", type=int, default=4, help="that count, after one that compiles")
    parser.add_argument("--pack-tokens", type=int, default=16_384)
    parser.add_argument("--engines", type=int, default=1, help="of ours on the GPU, which share the rollouts")
    parser.add_argument("--precision", default="auto", help="optim.precision")
    parser.add_argument("--sleep", action="store_true", help="either engine gives its memory back while training")
    parser.add_argument("--micro-batch", type=int, default=32, help="TRL's")
    parser.add_argument("--attention", default="sdpa", help="TRL's, as transformers names them")
    parser.add_argument("--liger", action="store_true", help="TRL with Liger's kernels")
    parser.add_argument("--timeout", type=float, default=540, help="of one side, seconds")
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--apart", action="store_true", help="the sides at once, on GPUs 0 and 1")
    parser.add_argument("--side", choices=["ours", "trl"], help="one side alone, in this process")
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.side:
        print(json.dumps({"ours": run_ours, "trl": run_trl}[options.side](options)), flush=True)
        return
    sides, rows = both(options), []
    for rollouts in options.rollouts:
        steps = {side: found[rollouts] for side, found in sides.items() if rollouts in found}
        typical = {side: median(step["step_s"] for step in found[1:]) for side, found in steps.items()}
        counted = steps["ours"][1:]
        shown = {name: round(median(step[name] for step in counted), 4) for name in counted[0]}
        what = f"Qwen3 {options.size}, {rollouts} rollouts of {options.prompt} + {options.new} tokens, group "
        what += f"{options.group}, packs of {options.pack_tokens}, {options.engines} engines"
        if not options.no_baseline:
            where = "at once, with the host's second GPU and half of its cores" if options.apart else "in turn"
            what += f"; baseline: TRL GRPO + vLLM colocated, {where}"
        found = row(
            "grpo_step", what, ours=typical["ours"], baseline=typical.get("trl", typical["ours"]), unit="s a step",
            tokens_per_s=round(shown["tokens"] / typical["ours"], 1), phases=shown,
            steps={side: [round(step["step_s"], 3) for step in found] for side, found in steps.items()},
        )  # fmt: skip
        rows.append(found if "trl" in typical else found | {"baseline": None, "ratio": None})
    write("grpo_step", rows, options.out)


if __name__ == "__main__":
    main()
