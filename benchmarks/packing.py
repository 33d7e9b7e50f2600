"""What packing is worth: real tokens a second of packed steps, beside the same documents padded, and both losses.

A step is what a run would take: packs in the product's order. Every arm trains on the documents of that step, all at
once, from the same weights; only the padding differs. Padded batches are of 8 documents in their drawn order
("longest": to the longest of the 8; "max": to 8192), or in the order of their lengths within the step ("grouped"). A
padding token is a real one to the model, at the end of its document and without loss: it is embedded, goes through
every block, and attends to what is before it; the LM head alone is spared it, in favour of the padded arms. So is the
shape: their documents too are laid end to end in packs of the same size, so that all arms run the same compiled
kernels, where a framework that pads would see a new shape in every batch; what of these packs stays empty is taken off
their time, in proportion. The losses of arms differ by rounding alone.

    python -m benchmarks.packing [--size 0.6b] [--pack-tokens 16384] [--packs 4] [--steps 5] [--workloads W1 W2]
        [--precision auto] [--longest 8192] [--out FILE]
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.report import row, write
from benchmarks.sft import policy
from benchmarks.shapes import SIZES
from benchmarks.workloads import LONGEST, WORKLOADS, documents, packs_of

BATCH = 8
ARMS = {
    "longest": "padded to the longest of 8",
    "grouped": "padded to the longest of 8, grouped by length within a step",
    "max": "padded to the longest that is allowed",
}


def padded(samples: Sequence[Any], arm: str, longest: int) -> list[Any]:
    """The samples of a step, extended by what batches of 8 would pad."""
    order = sorted(samples, key=len) if arm == "grouped" else list(samples)
    found = []
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        length = longest if arm == "max" else max(map(len, batch))
        found += [extended(sample, length) for sample in batch]
    return found


def extended(sample: Any, length: int) -> Any:
    """A sample with padding at its end, to `length` tokens."""
    room = (0, length - len(sample))
    columns = {name: np.pad(getattr(sample, name), room) for name in ("input_ids", "target_ids", "loss_mask")}
    return replace(sample, **columns)


def packs_of_arm(packs: Sequence[Any], arm: str, *, pack_tokens: int, longest: int) -> list[Any]:
    """A step of the packed arm as another arm takes it."""
    from posttrain.data.pack import pack

    if arm == "packed":
        return list(packs)
    drawn = [pair for each in packs for pair in zip(each.draws, each.samples, strict=True)]
    samples = [sample for _, sample in sorted(drawn, key=lambda pair: pair[0])]
    return pack([(sample,) for sample in padded(samples, arm, longest)], pack_tokens=pack_tokens)


def measure(case: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Workload -> arm -> seconds and losses of every step, its real tokens and its positions."""
    import torch

    from benchmarks.fsdp_scaling import write_model

    with tempfile.TemporaryDirectory() as folder:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        case = case | {"model_uri": write_model(Path(folder), case["size"], device)}
        rank = policy(case)
    start = {name: tensor.clone() for name, tensor in rank.engine.state_to_fill().items()}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for workload in case["workloads"]:
        wanted = int(1.1 * case["steps"] * case["packs"] * case["micro_tokens"])
        texts = documents(workload, wanted, seed=0, vocab=case["vocab"], longest=case["longest"])
        packs = packs_of(texts, case["micro_tokens"])
        steps = [packs[n * case["packs"] : (n + 1) * case["packs"]] for n in range(case["steps"])]
        assert len(steps[-1]) == case["packs"], "the documents make too few packs"
        found[workload] = {}
        for arm in ("packed", *ARMS):
            for name, tensor in rank.engine.state_to_fill().items():
                tensor.copy_(start[name])
            rank.engine.filled()
            found[workload][arm] = trained(case, rank, steps[: 2 if arm == "max" else None], arm)
    return found


def trained(case: dict[str, Any], rank: Any, steps: Sequence[Any], arm: str) -> dict[str, Any]:
    """One arm of a workload; the first of all steps of the process compiles, and is timed again."""
    import torch

    from posttrain.model.losses.sft import SFTLoss

    found: dict[str, Any] = {"seconds": [], "losses": [], "tokens": [], "positions": [], "empty": []}
    for number, packed in enumerate(steps):
        packs = packs_of_arm(packed, arm, pack_tokens=case["micro_tokens"], longest=case["longest"])
        targets = sum(pack.loss_tokens for pack in packs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        found["losses"].append(rank.train_step(number, packs, SFTLoss(), targets)["loss"])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found["seconds"].append(time.perf_counter() - started)
        found["tokens"].append(int(targets))
        found["positions"].append(sum(pack.num_tokens for pack in packs))
        found["empty"].append(len(packs) * case["micro_tokens"] - found["positions"][-1])
    return found


def rate(found: dict[str, Any], *, spared: bool) -> float:
    """Real tokens a second, median of the steps after the first; `spared`: as if the packs' own tails cost nothing."""
    steps = zip(*(found[name] for name in ("tokens", "seconds", "positions", "empty")), strict=True)
    return median(
        tokens / seconds * ((positions + empty) / positions if spared else 1.0)
        for tokens, seconds, positions, empty in list(steps)[1:]
    )


def described(case: dict[str, Any], workload: str, arms: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each way to pad."""
    rows = []
    what = f"Qwen3 {case['size']}, SFT, packs of {case['micro_tokens']}, {WORKLOADS[workload]}"
    for arm, words in ARMS.items():
        mine, theirs = arms["packed"], arms[arm]
        apart = max(abs(a - b) for a, b in zip(mine["losses"], theirs["losses"], strict=False))
        more = {"losses_apart": apart, "packed": mine, "padded": theirs}
        more["positions_ratio"] = round(theirs["positions"][0] / mine["positions"][0], 3)
        both = {"ours": rate(mine, spared=False), "baseline": rate(theirs, spared=True)}
        rows.append(row("packing", f"{workload}: {what}; baseline: {words}", **both, unit="tokens/s", **more))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.6b", choices=SIZES)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--pack-tokens", type=int, default=16_384)
    parser.add_argument("--packs", type=int, default=4, help="of a packed step")
    parser.add_argument("--steps", type=int, default=5, help="of an arm, the first not timed; two of the last arm")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--longest", type=int, default=LONGEST, help="document, and what the last arm pads to")
    parser.add_argument("--out")
    options = parser.parse_args()
    case: dict[str, Any] = {"size": options.size, "vocab": SIZES[options.size][-1], "lr": 1e-5}
    case |= {"micro_tokens": options.pack_tokens, "packs": options.packs, "steps": options.steps}
    case |= {"precision": options.precision, "longest": options.longest, "workloads": options.workloads}
    case |= {"activation_checkpointing": "none"}
    rows = []
    for workload, arms in measure(case).items():
        rows += described(case, workload, arms)
    write("packing", rows, options.out)


if __name__ == "__main__":
    main()
