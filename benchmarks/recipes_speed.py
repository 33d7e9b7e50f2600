"""Tokens per second and MFU of whole training steps: SFT, DPO and online distillation, one rank, optimizer included.

A PolicyRank as in a run but without Ray, random Qwen3-shaped weights, packs full of documents of lognormal lengths
(benchmarks/decoder.py), every token in the loss; AdamW with float32 masters, bfloat16 on a GPU. DPO's reference lies in
a column, as annotate leaves it. A distillation's teacher is the next larger shape and its forward pass counts as work.
MFU is exact FLOPs (model/flops.py) over the median step's time and the data sheet's peak; null where that is unknown.
The baseline of each row is SFT at the same size. Every case runs in a process of its own; one that fails is named on
stderr and leaves the others alone; the exit status is then 1.

    python -m benchmarks.recipes_speed [--recipes sft dpo distill] [--sizes 0.6b 1.7b] [--tokens 16384] [--packs 2]
        [--steps 10] [--checkpointing none] [--out FILE]
"""

import argparse
import json
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import in_a_process, row, write
from benchmarks.shapes import SIZES, hf_config

TEACHERS = {"tiny": "tiny", "0.6b": "1.7b", "1.7b": "4b"}
"""Student -> teacher of a distillation."""


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every step but the first two, which compile; losses, FLOPs of a step, and peak memory."""
    import torch

    from benchmarks.fsdp_scaling import write_model
    from posttrain.compute.collective import MeetingPoint
    from posttrain.compute.mesh import Sizes
    from posttrain.model.losses import count
    from posttrain.workflow.policy_model import Build
    from posttrain.workflow.policy_rank import PolicyRank
    from posttrain.workflow.training import Training

    on_gpu, vocab = torch.cuda.is_available(), SIZES[case["size"]][-1]
    settings = {"lr": 1e-5, "schedule": "constant", "warmup_steps": 0, "betas": (0.9, 0.95), "weight_decay": 0.0}
    settings |= {"num_steps": 100, "max_grad_norm": 1.0, "pack_tokens": case["tokens"]}
    settings["activation_checkpointing"] = case["activation_checkpointing"]
    with tempfile.TemporaryDirectory() as folder:
        device, teacher_uri = "cuda" if on_gpu else "cpu", None
        uri = write_model(made(folder, "student"), case["size"], device)
        if case["recipe"] == "distill":
            teacher_uri = write_model(made(folder, "teacher"), TEACHERS[case["size"]], device)
        if on_gpu:
            torch.cuda.empty_cache()
        facts = {"backend": "posttrain", "training": Training(**settings), "reference": False}
        rank = PolicyRank(rank=0, sizes=Sizes(data=1), model_uri=uri, build=Build(teacher_uri=teacher_uri), **facts)
        rank.meeting = MeetingPoint("127.0.0.1")
        costs = rank.join(rank.meeting.address, 300.0)
    loss, seconds, losses, work = loss_of(case["recipe"]), [], [], []
    for step in range(case["steps"] + 2):
        packs = [full_pack(case["tokens"], vocab, seed=100 * step + n) for n in range(case["packs"])]
        work.append(sum(map(costs.of, packs)) + taught(case, packs))
        started = time.perf_counter()
        losses.append(rank.train_step(step, packs, loss, count(loss, packs))["loss"])
        if on_gpu:
            torch.cuda.synchronize()  # the optimizer's kernels are the step's too
        seconds.append(time.perf_counter() - started)
    return {
        "seconds": [round(each, 4) for each in seconds[2:]],
        "flops": median(work[2:]),
        "peak": costs.peak,
        "losses": [round(each, 4) for each in losses],
        "allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
    }


def made(folder: str, name: str) -> Path:
    """A new folder below another."""
    path = Path(folder, name)
    path.mkdir()
    return path


def loss_of(recipe: str) -> Any:
    """What a recipe minimises, with the config's defaults."""
    from posttrain.model.losses.distill import DivergenceLoss
    from posttrain.model.losses.dpo import DPOLoss
    from posttrain.model.losses.sft import SFTLoss

    return {"sft": SFTLoss(), "dpo": DPOLoss(beta=0.1), "distill": DivergenceLoss(kind="forward_kl")}[recipe]


def full_pack(tokens: int, vocab: int, *, seed: int) -> Any:
    """Documents in pairs that fill a pack, all in the loss, each with a reference's logprob."""
    import numpy as np

    from benchmarks.decoder import documents
    from posttrain.data.sample import shift
    from posttrain.data.types import Pack

    found = documents(tokens, seed, vocab)
    if len(found) % 2:  # the longest becomes two, which share the token between them
        longest = found.pop(max(range(len(found)), key=lambda number: len(found[number])))
        middle = len(longest) // 2
        found += [longest[: middle + 1], longest[middle:]]
    samples = [shift(ids, np.ones(len(ids))) for ids in found]
    for sample in samples:
        sample.fields["ref_logprob"] = -float(len(sample)) * float(np.log(vocab))
    return Pack(samples=tuple(samples), num_units=len(samples) // 2)


def taught(case: dict[str, Any], packs: list[Any]) -> float:
    """FLOPs of the teacher's forward pass over the packs, its distributions at every loss row included."""
    if case["recipe"] != "distill":
        return 0.0
    import torch

    from posttrain.model.decoder import Decoder
    from posttrain.model.families import decoder_config
    from posttrain.model.flops import flop_counts

    with torch.device("meta"):
        teacher = Decoder(decoder_config(hf_config(TEACHERS[case["size"]])))
    lengths = [len(sample) for pack in packs for sample in pack.samples]
    return flop_counts(teacher).forward(lengths, sum(lengths))


def described(case: dict[str, Any], found: dict[str, Any], baseline: float | None) -> dict[str, Any]:
    """A row of the results: tokens per second, beside those of SFT."""
    second, tokens = median(found["seconds"]), case["packs"] * case["tokens"]
    teacher = f", teacher {TEACHERS[case['size']]}" if case["recipe"] == "distill" else ""
    name = f"{case['recipe']}, Qwen3 {case['size']}{teacher}, {case['packs']} x {case['tokens']} tokens"
    name += f", checkpointing {case['activation_checkpointing']}"
    rate = tokens / second
    mfu = None if found["peak"] is None else round(found["flops"] / second / found["peak"], 4)
    more = {"mfu": mfu, "tflops": round(found["flops"] / second / 1e12, 4), "measured": found}
    return row("recipes_speed", name, ours=rate, baseline=baseline or rate, unit="tokens/s", **more)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown of the results, as docs/recipes.md has it: a line a case."""
    head = ["recipe and model", "tokens/s", "of SFT's", "MFU", "peak memory, GiB"]
    lines = [head, ["---"] * len(head)]
    for found in results:
        name, memory = found["workload"].rsplit(", ", 2)[0], found["measured"]["allocated_gib"]
        mfu = "" if found["mfu"] is None else f"{found['mfu']:.1%}"
        size = "" if memory is None else f"{memory:.1f}"
        lines.append([name, f"{found['ours']:,.0f}", f"{found['ratio']:.2f}", mfu, size])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["sft", "dpo", "distill"], choices=["sft", "dpo", "distill"])
    parser.add_argument("--sizes", nargs="+", default=["0.6b", "1.7b"], choices=TEACHERS)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--packs", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=10, help="steps that count, after two that compile")
    parser.add_argument("--checkpointing", default="none")
    parser.add_argument("--timeout", type=float, default=280, help="of one case, seconds")
    parser.add_argument("--case", help="one case alone, in this process, as JSON")
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(json.loads(options.case))), flush=True)
        return
    rows, failed, of_sft = [], [], {}
    for size, recipe in product(options.sizes, options.recipes):
        case = {"recipe": recipe, "size": size, "activation_checkpointing": options.checkpointing}
        case |= {"tokens": options.tokens, "packs": options.packs, "steps": options.steps}
        found = in_a_process("benchmarks.recipes_speed", case, timeout_s=options.timeout)
        if isinstance(found, str):
            failed.append(case)
            print(f"{recipe} {size} failed: {found}", file=sys.stderr, flush=True)
            continue
        rows.append(described(case, found, of_sft.get(size)))
        if recipe == "sft":
            of_sft[size] = rows[-1]["ours"]
    write("recipes_speed", rows, options.out)
    print(table(rows))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
