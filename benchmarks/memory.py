"""Is the estimate of memory what a GPU holds? Real training steps of one rank, their measured peak beside the estimate.

Every shape runs in a process of its own: a PolicyRank as in a run but without Ray, SFT on full packs with all tokens
in the loss, random Qwen3-shaped weights. `ours` is the estimate of tensors (model/memory.py), `baseline` the peak that
torch's allocator counts; the row also has what it reserved and what the process took of the device. A shape that fails
is named on stderr and leaves the others alone; the exit status is then 1.

    python -m benchmarks.memory [--sizes 0.6b 1.7b 4b] [--tokens 16384] [--packs 2] [--steps 3]
        [--precisions bfloat16 ...] [--checkpointing none selective full] [--out FILE]
"""

import argparse
import json
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.report import in_a_process, row, write
from benchmarks.shapes import SIZES, hf_config

GIB = 2**30


def estimated(case: dict[str, Any]) -> dict[str, Any]:
    """The estimate for a case, GiB by part."""
    import torch

    from posttrain.model.decoder import Decoder
    from posttrain.model.families import decoder_config
    from posttrain.model.memory import Setup, memory

    with torch.device("meta"):
        model = Decoder(decoder_config(hf_config(case["size"])))
    found = memory(
        model,
        Setup(
            pack_tokens=case["tokens"],
            micro_batches=case["packs"],
            precision=case["precision"],
            activation_checkpointing=case["activation_checkpointing"],
        ),
    )
    parts = {name: round(size / GIB, 3) for name, size in found.parts().items()}
    return {"tensors": found.tensors / GIB, "total": found.total / GIB, "parts": parts, "moment": found.moment}


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Peaks of real steps in this process, GiB."""
    import torch

    from benchmarks.fsdp_scaling import write_model
    from posttrain.compute.collective import MeetingPoint
    from posttrain.compute.mesh import Sizes
    from posttrain.model.losses.sft import SFTLoss
    from posttrain.workflow.policy_rank import PolicyRank
    from posttrain.workflow.training import Training

    settings = {
        "num_steps": 100,
        "lr": 1e-5,
        "schedule": "constant",
        "warmup_steps": 0,
        "betas": (0.9, 0.95),
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "pack_tokens": case["tokens"],
        "precision": case["precision"],
        "activation_checkpointing": case["activation_checkpointing"],
    }
    with tempfile.TemporaryDirectory() as folder:
        uri = write_model(Path(folder), case["size"], "cuda")
        torch.cuda.empty_cache()
        rank = PolicyRank(
            rank=0,
            sizes=Sizes(data=1),
            model_uri=uri,
            backend="posttrain",
            training=Training(**settings),
            reference=False,
        )
        rank.meeting = MeetingPoint("127.0.0.1")
        rank.join(rank.meeting.address, 300.0)
    loss, vocab, losses = SFTLoss(), SIZES[case["size"]][-1], []
    torch.cuda.empty_cache()
    for step in range(case["steps"] + 1):
        if step == 1:  # the first compiles, and makes the optimizer's moments
            torch.cuda.reset_peak_memory_stats()
        packs = [full_pack(case["tokens"], vocab, seed=100 * step + number) for number in range(case["packs"])]
        losses.append(rank.train_step(step, packs, loss, float(case["tokens"] * case["packs"]))["loss"])
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.max_memory_allocated() / GIB,
        "reserved": torch.cuda.max_memory_reserved() / GIB,
        "device_used": (total - free) / GIB,
        "losses": [round(each, 4) for each in losses],
    }


def full_pack(tokens: int, vocab: int, *, seed: int) -> Any:
    """Skewed documents that fill a pack, all in the loss."""
    import numpy as np

    from benchmarks.decoder import documents
    from posttrain.data.sample import shift
    from posttrain.data.types import Pack

    samples = [shift(ids, np.ones(len(ids))) for ids in documents(tokens, seed, vocab)]
    return Pack(samples=tuple(samples), num_units=len(samples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["0.6b", "1.7b", "4b"], choices=SIZES)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--packs", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=3, help="steps that count, after one that compiles")
    parser.add_argument("--precisions", nargs="+", default=["bfloat16"])
    parser.add_argument("--checkpointing", nargs="+", default=["none"])
    parser.add_argument("--timeout", type=float, default=240, help="of one shape, seconds")
    parser.add_argument("--case", help="one shape alone, in this process, as JSON")
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(json.loads(options.case))), flush=True)
        return
    rows, failed = [], []
    for size, precision, mode in product(options.sizes, options.precisions, options.checkpointing):
        case = {"size": size, "precision": precision, "activation_checkpointing": mode}
        case |= {"tokens": options.tokens, "packs": options.packs, "steps": options.steps}
        expected, name = (
            estimated(case),
            f"Qwen3 {size}, {options.packs} x {options.tokens} tokens, {precision}, {mode}",
        )
        found = in_a_process("benchmarks.memory", case, timeout_s=options.timeout)
        if isinstance(found, str):
            failed.append(name)
            print(f"{name}: estimated {expected['tensors']:.2f} GiB, failed: {found}", file=sys.stderr, flush=True)
            continue
        error = round(expected["tensors"] / found["allocated"] - 1, 4)
        made = row("memory", name, ours=expected["tensors"], baseline=found["allocated"], unit="GiB")
        rows.append(made | {"error": error, "estimate": expected, "measured": found})
    write("memory", rows, options.out)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
