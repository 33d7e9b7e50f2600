"""A whole SFT step, forward to AdamW, on skewed documents: ours beside TRL's SFTTrainer with packing and Liger.

Full fine-tune of random Qwen3-shaped weights (both sides begin with the same), documents of lognormal lengths, packs of
real fill, every token a target. Ours is a PolicyRank as in a run but without Ray, batches made and moved within the
step, packs as the product's packer plans them; TRL's side is in trl_sft.py, at float32 masters like ours and at its
fastest precision, bfloat16 weights and moments. Both take equally many positions a micro-batch and a step. Ours and
baseline are targets a second, the median of the steps that count; MFU is exact (model/flops.py), on 989 TFLOP/s. Each
side runs alone in a process of its own; one that fails, as by memory, is named in its row, and the exit status is 1.

    python -m benchmarks.sft [--size 0.6b 1.7b 4b 8b] [--no-baseline] [--steps 6] [--precision bfloat16]
        [--tokens-per-step 65536] [--micro-tokens 16384] [--trl-precision float32 bfloat16] [--out FILE]
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import in_a_process, row, write
from benchmarks.shapes import SIZES, hf_config
from benchmarks.workloads import WORKLOADS, count_of, documents, packs_of

PEAK = 989e12
"""Dense bfloat16 FLOP/s of an H100 or H200 by its data sheet."""
WARMUP = 2
"""Steps that compile, and make the optimizer's moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a size is trained with where no flag says otherwise: what fits in 139 GiB."""

    micro_tokens: int
    """Positions of a micro-batch: a pack of ours, rows of TRL's."""
    step_tokens: int
    row_tokens: int = 8192
    """A row of TRL's, and the longest document."""
    precision: str = "bfloat16"
    baselines: tuple[str, ...] = ("float32", "bfloat16")


SHAPES = {
    "tiny": Shape(micro_tokens=512, step_tokens=1024, row_tokens=256, precision="auto", baselines=("float32",)),
    "0.6b": Shape(micro_tokens=32_768, step_tokens=65_536),
    "1.7b": Shape(micro_tokens=32_768, step_tokens=262_144),
    "4b": Shape(micro_tokens=8192, step_tokens=65_536),
    # 18 bytes a parameter would be 137 GiB.
    "8b": Shape(micro_tokens=8192, step_tokens=65_536, precision="bfloat16_stochastic", baselines=("bfloat16",)),
}
PRECISIONS = {
    "float32": "float32 weights and moments under autocast",
    "bfloat16": "bfloat16 weights and moments",
}
"""Of TRL's side."""


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds and losses of every step of ours, its documents' lengths in targets, and peak memory."""
    import torch

    from posttrain.model.losses.sft import SFTLoss

    on_gpu = torch.cuda.is_available()
    found = documents("W1", case["documents"], seed=0, vocab=case["vocab"], longest=case["row_tokens"])
    packs = packs_of(found, case["micro_tokens"])
    rank = policy(case)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    each = case["step_tokens"] // case["micro_tokens"]
    seconds, losses, lengths = [], [], []
    started = time.perf_counter()
    for step in range(case["steps"] + case["warmup"]):
        share = packs[step * each : (step + 1) * each]
        assert len(share) == each, "the documents make too few packs"
        targets = sum(pack.loss_tokens for pack in share)
        losses.append(rank.train_step(step, share, SFTLoss(), targets)["loss"])
        if on_gpu:
            torch.cuda.synchronize()  # the optimizer's kernels are the step's too
        ended = time.perf_counter()
        seconds.append(ended - started)
        started = ended
        lengths.append([len(sample) for pack in share for sample in pack.samples])
    return {
        "seconds": seconds,
        "losses": losses,
        "lengths": lengths,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }


def policy(case: dict[str, Any]) -> Any:
    """A PolicyRank that has joined, alone."""
    from posttrain.compute.collective import MeetingPoint
    from posttrain.compute.mesh import Sizes
    from posttrain.workflow.policy_rank import PolicyRank
    from posttrain.workflow.training import Training

    training = Training(
        num_steps=1000,
        lr=case["lr"],
        schedule="constant",
        warmup_steps=0,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        max_grad_norm=1.0,
        pack_tokens=case["micro_tokens"],
        precision=case["precision"],
        activation_checkpointing=case["activation_checkpointing"],
    )
    one = {"rank": 0, "sizes": Sizes(data=1), "model_uri": case["model_uri"], "backend": "posttrain"}
    rank = PolicyRank(**one, training=training, reference=False)
    rank.meeting = MeetingPoint("127.0.0.1")
    rank.join(rank.meeting.address, 600.0)
    return rank


def write_random_model(case: dict[str, Any]) -> dict[str, Any]:
    """Draw the weights that both sides begin with, into case["folder"]."""
    import torch

    from benchmarks.fsdp_scaling import write_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"model_uri": write_model(Path(case["folder"]), case["size"], device)}


def counted(size: str, step_tokens: int, found: dict[str, Any]) -> dict[str, Any]:
    """Of one side: targets a second, MFU, the share of positions that are targets, memory, losses and times."""
    import torch

    from posttrain.model.decoder import Decoder
    from posttrain.model.families import decoder_config
    from posttrain.model.flops import flop_counts

    with torch.device("meta"):
        costs = flop_counts(Decoder(decoder_config(hf_config(size))))
    steps = [(sum(each), costs.step(each, sum(each))) for each in found["lengths"]]
    timed = list(zip(steps, found["seconds"], strict=True))[WARMUP:]
    flops = median(work / seconds for (_, work), seconds in timed)
    return {
        "tokens_per_s": round(median(tokens / seconds for (tokens, _), seconds in timed), 1),
        "mfu_exact": round(flops / PEAK, 4) if torch.cuda.is_available() else None,
        "tflops": round(flops / 1e12, 4),
        "fill": round(sum(tokens for tokens, _ in steps) / len(steps) / step_tokens, 4),
        "peak_gib": None if found["peak_gib"] is None else round(found["peak_gib"], 2),
        "losses": [round(loss, 4) for loss in found["losses"]],
        "seconds": [round(seconds, 4) for seconds in found["seconds"]],
    }


def rows_of(size: str, shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One size: a row for each precision of the baseline, or one without a baseline."""
    case: dict[str, Any] = {"size": size, "vocab": SIZES[size][-1], "lr": 1e-5, "steps": options.steps}
    case |= asdict(shape) | {"warmup": WARMUP, "activation_checkpointing": options.checkpointing}
    case |= {"trl_batch": shape.micro_tokens // shape.row_tokens}
    assert shape.step_tokens % shape.micro_tokens == 0, "a step is a whole number of micro-batches"
    assert shape.micro_tokens % shape.row_tokens == 0, "a micro-batch is a whole number of TRL's rows"
    # A tenth more than positions: packs of few rows are not all full.
    tokens = int(1.1 * (options.steps + WARMUP) * shape.step_tokens)
    case["documents"] = count_of("W1", tokens, seed=0, longest=shape.row_tokens)
    sides: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = in_a_process("benchmarks.sft", case | {"side": "model", "folder": folder}, timeout_s=options.timeout)
        assert isinstance(made, dict), f"no model: {made}"
        case |= made
        wanted = [] if options.side == "trl" else ["ours"]
        wanted += [] if options.side == "ours" else list(shape.baselines)
        for side in wanted:
            precision = shape.precision if side == "ours" else side
            each = case | {"side": "ours" if side == "ours" else "trl", "precision": precision}
            found = in_a_process("benchmarks.sft", each, timeout_s=options.timeout)
            if isinstance(found, str):
                print(f"{size}, {side} failed: {found}", file=sys.stderr, flush=True)
                sides[side] = {"failed": found.strip().splitlines()[-1][:300]}
            else:
                sides[side] = counted(size, shape.step_tokens, found)
    return [described(size, shape, sides, each) for each in (shape.baselines if options.side != "ours" else [None])]


def described(size: str, shape: Shape, sides: dict[str, Any], baseline: str | None) -> dict[str, Any]:
    """A row of the results; a side that failed, or did not run, has no number."""
    what = f"Qwen3 {size}, SFT, {shape.step_tokens} positions a step in micro-batches of {shape.micro_tokens}, "
    what += f"{WORKLOADS['W1']}, {shape.precision}"
    if baseline is not None:
        kernels = "" if size == "tiny" else " + Liger + flash attention"
        what += f"; baseline: TRL, packing bfd{kernels}, {PRECISIONS[baseline]}"
    ours, theirs = sides.get("ours"), sides.get(baseline or "none")
    rates = [(side or {}).get("tokens_per_s") for side in (ours, theirs)]
    return row("sft", what, ours=rates[0], baseline=rates[1], unit="tokens/s", measured=ours, trl=theirs)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["0.6b", "1.7b", "4b", "8b"], choices=SHAPES)
    parser.add_argument("--against", default="trl", choices=["trl"])
    parser.add_argument("--no-baseline", dest="side", action="store_const", const="ours", default=None)
    parser.add_argument("--side", choices=["ours", "trl"], help="one side alone")
    parser.add_argument("--steps", type=int, default=6, help="that count, after two that compile")
    parser.add_argument("--precision", help="ours, an optim.precision; that of the size by default")
    parser.add_argument("--trl-precision", nargs="+", choices=PRECISIONS, help="TRL's, a row each")
    parser.add_argument("--tokens-per-step", type=int, help="positions, on either side")
    parser.add_argument("--micro-tokens", type=int, help="positions of a micro-batch, on either side")
    parser.add_argument("--checkpointing", default="none", help="of ours, a parallel.activation_checkpointing")
    parser.add_argument("--timeout", type=float, default=280, help="of one side, seconds")
    parser.add_argument("--case", help="one side alone, in this process, as JSON")
    parser.add_argument("--out")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.case:
        case = json.loads(options.case)
        print(json.dumps(run(case)), flush=True)
        return
    flags = {
        "precision": options.precision,
        "step_tokens": options.tokens_per_step,
        "micro_tokens": options.micro_tokens,
        "baselines": options.trl_precision and tuple(options.trl_precision),
    }
    chosen = {name: value for name, value in flags.items() if value is not None}
    failed = False
    for size in options.size:
        rows = rows_of(size, Shape(**asdict(SHAPES[size]) | chosen), options)
        write("sft", rows, options.out, keep=True)
        failed |= any("failed" in (each[side] or {}) for each in rows for side in ("measured", "trl"))
    sys.exit(1 if failed else 0)


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One process of a size."""
    from benchmarks import trl_sft

    return {"model": write_random_model, "ours": measure, "trl": trl_sft.measure}[case["side"]](case)


if __name__ == "__main__":
    main()
