"""What packing is worth: real tokens a second of packed steps, beside the same documents padded, and both losses.

Every arm trains on the same documents in every step, from the same weights; only the padding differs. The packed arm
has them packed as a run packs a window. Padded batches are of 8 documents in their drawn order ("longest": to the
longest of the 8; "max": to 8192), or in the order of their lengths within the step ("grouped"). A padding token is a
real one to the model, at the end of its document and without loss: it is embedded, goes through every block, and
attends to what is before it; the LM head alone is spared it, in favour of the padded arms. So is the shape: their
documents too are laid end to end in packs of the same size, so that all arms run the same compiled kernels, where a
framework that pads would see a new shape in every batch; what of these packs stays empty is taken off their time, in
proportion. The losses of arms differ by rounding alone.

    python -m benchmarks.packing [--size 0.6b] [--units 256] [--steps 3] [--workloads W1 W2] [--pack-tokens 8192]
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
from benchmarks.workloads import LONGEST, WORKLOADS, documents

BATCH = 8
ARMS = {
    "longest": "padded to the longest of 8",
    "grouped": "padded to the longest of 8, grouped by length within a step",
    "max": "padded to the longest that is allowed",
}


def packs_of_arm(samples: Sequence[Any], arm: str, *, pack_tokens: int, longest: int) -> list[Any]:
    """A step's samples in packs, extended by what batches of 8 would pad."""
    from posttrain.data.pack import pack

    found = list(samples) if arm == "packed" else padded(samples, arm, longest)
    return pack([(sample,) for sample in found], pack_tokens=pack_tokens)


def padded(samples: Sequence[Any], arm: str, longest: int) -> list[Any]:
    """The samples, each as long as its batch."""
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


def measure(case: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Workload -> arm -> seconds and losses of every step, its real tokens and its positions."""
    import torch

    from benchmarks.fsdp_scaling import write_model
    from posttrain.data.sample import shift

    with tempfile.TemporaryDirectory() as folder:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        case = case | {"model_uri": write_model(Path(folder), case["size"], device)}
        rank = policy(case)
    start = {name: tensor.clone() for name, tensor in rank.engine.state_to_fill().items()}
    units, found = case["units"], {}
    warmed = False
    for workload in case["workloads"]:
        texts = documents(workload, case["steps"] * units, seed=0, vocab=case["vocab"], longest=case["longest"])
        samples = [shift(ids, np.ones(len(ids))) for ids in texts]
        steps = [samples[n * units : (n + 1) * units] for n in range(case["steps"])]
        found[workload] = {}
        for arm in ("packed", *ARMS):
            if not warmed:
                trained(case, rank, [samples[:BATCH]] * 2, arm)  # compiles
                warmed = True
            for name, tensor in rank.engine.state_to_fill().items():
                tensor.copy_(start[name])
            rank.engine.filled()
            found[workload][arm] = trained(case, rank, steps[: 1 if arm == "max" else None], arm)
    return found


def trained(case: dict[str, Any], rank: Any, steps: Sequence[Any], arm: str) -> dict[str, Any]:
    """One arm of a workload."""
    import torch

    from posttrain.model.losses.sft import SFTLoss

    found: dict[str, Any] = {"seconds": [], "losses": [], "tokens": [], "positions": [], "empty": []}
    for number, samples in enumerate(steps):
        packs = packs_of_arm(samples, arm, pack_tokens=case["micro_tokens"], longest=case["longest"])
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
    """Real tokens a second, median of the steps; `spared`: as if the packs' own tails cost nothing."""
    steps = zip(*(found[name] for name in ("tokens", "seconds", "positions", "empty")), strict=True)
    return median(
        tokens / seconds * ((positions + empty) / positions if spared else 1.0)
        for tokens, seconds, positions, empty in steps
    )


def described(case: dict[str, Any], workload: str, arms: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each way to pad."""
    rows = []
    what = f"Qwen3 {case['size']}, SFT, {case['units']} documents a step, packs of {case['micro_tokens']}, "
    what += WORKLOADS[workload]
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
    parser.add_argument("--pack-tokens", type=int, default=8192)
    parser.add_argument("--units", type=int, default=256, help="documents of a step")
    parser.add_argument("--steps", type=int, default=3, help="of an arm; the last arm has one")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--longest", type=int, default=LONGEST, help="document, and what the last arm pads to")
    parser.add_argument("--out")
    options = parser.parse_args()
    case: dict[str, Any] = {"size": options.size, "vocab": SIZES[options.size][-1], "lr": 1e-5}
    case |= {"micro_tokens": options.pack_tokens, "units": options.units, "steps": options.steps}
    case |= {"precision": options.precision, "longest": options.longest, "workloads": options.workloads}
    case |= {"activation_checkpointing": "none"}
    rows = []
    for workload, arms in measure(case).items():
        rows += described(case, workload, arms)
    write("packing", rows, options.out)


if __name__ == "__main__":
    main()
