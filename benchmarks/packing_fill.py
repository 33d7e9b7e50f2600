"""How full are packs, and how fast is their plan? Ours, window by window, beside TRL's best-fit-decreasing.

TRL plans over the whole data set at once, which no stream can; we plan window by window.
Both get the same lengths. TRL packs the tokens in the same call, so its time is the whole
call's; ours groups views of the tokens, which are copied later, when a batch is made. The last
columns say how far packs are sorted by length: a batch of few packs is then no fair sample. Prints one
JSON line per workload and length of packs and writes benchmarks/results/packing_fill.json.

    python benchmarks/packing_fill.py [--rows 200000]
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.mixture import WINDOW, window_draws
from posttrain.data.pack import pack, plan
from posttrain.data.sample import shift

RESULTS = Path(__file__).parent / "results" / "packing_fill.json"
LONGEST = 8192
PACK_TOKENS = (8192, 32_768)
UNIT = "million tokens packed a second; ours groups views and copies nothing until collate(), TRL's copies the tokens"
WORKLOADS = {
    "lognormal": "lengths lognormal, median 350, sigma 1.2, clipped to 8192",
    "mostly_short": "95 % lognormal, median 120, sigma 0.6; 5 % uniform 4096-8192",
}


def lengths_of(workload: str, rows: int) -> np.ndarray:
    """[rows] int64 token counts."""
    rng = np.random.default_rng(0)
    if workload == "lognormal":
        lengths = rng.lognormal(np.log(350), 1.2, rows)
    else:
        short, long = rng.lognormal(np.log(120), 0.6, rows), rng.uniform(4096, LONGEST, rows)
        lengths = np.where(rng.random(rows) < 0.95, short, long)
    return np.clip(lengths, 1, LONGEST).astype(np.int64)


def windows_of(lengths: np.ndarray, size: int) -> list[list[int]]:
    """The lengths, so many at a time."""
    return [lengths[start : start + size].tolist() for start in range(0, len(lengths), size)]


def ours(lengths: np.ndarray, pack_tokens: int) -> dict[str, float]:
    """Seconds of planning, seconds of planning and packing, and fill."""
    windows = windows_of(lengths, window_draws(pack_tokens))
    start = time.perf_counter()
    plans = [plan(window, pack_tokens=pack_tokens) for window in windows]
    planned = time.perf_counter() - start
    packs = [[window[i] for i in members] for window, found in zip(windows, plans, strict=True) for members in found]
    tokens, ones = np.zeros(LONGEST + 1, np.int32), np.ones(LONGEST + 1, np.float32)
    units = [[(shift(tokens[: n + 1], ones[: n + 1]),) for n in window] for window in windows]
    start = time.perf_counter()
    for window in units:
        pack(window, pack_tokens=pack_tokens)
    seconds = time.perf_counter() - start
    fill = float(lengths.sum() / (len(packs) * pack_tokens))
    in_least = sum(len(plan(window, pack_tokens=pack_tokens)) for window in windows_of(lengths, WINDOW))
    return {
        "plan_s": planned,
        "pack_s": seconds,
        "fill": fill,
        "fill_in_least_windows": float(lengths.sum() / (in_least * pack_tokens)),
        "sorted": between_packs(packs),
    }


def between_packs(packs: Sequence[Sequence[int]]) -> float:
    """Share of the variance of log length that lies between packs: 0 is a fair mix, 1 is packs of one length each."""
    logs = [np.log(np.asarray(lengths)) for lengths in packs]
    every = np.concatenate(logs)
    between = sum(len(each) * (each.mean() - every.mean()) ** 2 for each in logs) / len(every)
    return float(between / every.var())


def trl(lengths: np.ndarray, pack_tokens: int) -> dict[str, float]:
    """Seconds of trl.pack_dataset(strategy="bfd") on the same lengths, and fill."""
    import pyarrow as pa
    from datasets import Dataset, disable_caching
    from trl import pack_dataset

    disable_caching()
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    ids = pa.LargeListArray.from_arrays(offsets, pa.array(np.zeros(int(lengths.sum()), np.int32)))
    dataset = Dataset(pa.table({"input_ids": ids})).with_format("arrow")
    start = time.perf_counter()
    packed = pack_dataset(dataset, pack_tokens, strategy="bfd", map_kwargs={"batch_size": len(lengths)})
    seconds = time.perf_counter() - start
    found = [lengths.as_py() for lengths in packed.data.column("seq_lengths")]
    fill = float(lengths.sum() / (len(packed) * pack_tokens))
    return {"pack_s": seconds, "fill": fill, "sorted": between_packs(found)}


def row(workload: str, rows: int, pack_tokens: int) -> dict[str, Any]:
    """Both planners on one workload and one length of packs."""
    lengths = lengths_of(workload, rows)
    mine, theirs = ours(lengths, pack_tokens), trl(lengths, pack_tokens)
    million = float(lengths.sum()) / 1e6
    return {
        "benchmark": "packing_fill",
        "workload": f"{rows} rows, {WORKLOADS[workload]}, packs of {pack_tokens}",
        "hardware": f"1 of {os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("numpy", "trl", "datasets", "pyarrow")},
        "ours": round(million / mine["pack_s"], 1),
        "baseline": round(million / theirs["pack_s"], 1),
        "ratio": round(theirs["pack_s"] / mine["pack_s"], 2),
        "unit": UNIT,
        "ours_plan_only": round(million / mine["plan_s"], 1),
        "ours_fill": round(mine["fill"], 4),
        "ours_fill_in_windows_of_1024": round(mine["fill_in_least_windows"], 4),
        "baseline_fill": round(theirs["fill"], 4),
        "ours_length_variance_between_packs": round(mine["sorted"], 3),
        "baseline_length_variance_between_packs": round(theirs["sorted"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    rows = parser.parse_args().rows
    found = [row(workload, rows, pack_tokens) for pack_tokens in PACK_TOKENS for workload in WORKLOADS]
    for each in found:
        print(json.dumps(each))
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
