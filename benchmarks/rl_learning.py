"""Does what RL learns depend on how stale the weights are, or on the method? The default task, once a cell and seed.

Cells: staleness 0, 1 and 4, with a token's importance weight truncated at 2 (the default) and not truncated; and the
published methods of docs/rl.md with the default's hyperparameters. The baseline of a run is the model that it started
from, on the same held-out rows and sampling noise. Prints a JSON line a run and writes
benchmarks/results/rl_learning.json; cells that are not asked for stay in it as they are.

    python benchmarks/rl_learning.py [--seeds 0 1 2] [--cells staleness_1 gspo]
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from grpo_learning import summary
from report import RESULTS, versions

CELLS: dict[str, list[str]] = {
    "grpo": ["method.advantage=normalized", "method.loss=clipped", "method.weigh=sequence"],
    "dr_grpo": ["method.loss=clipped"],
    "dapo": [
        "method.advantage=normalized",
        "method.loss=clipped",
        "method.clip=[0.2, 0.28]",
        "method.replace_silent=true",
    ],
    "rloo": ["method.advantage=leave_one_out"],
    "reinforce++": ["method.advantage=batch_normalized", "method.loss=clipped"],
    "gspo": [
        "method.advantage=normalized",
        "method.loss=sequence",
        "method.weigh=sequence",
        "method.clip=[3e-4, 4e-4]",
    ],
    "cispo": ["method.advantage=normalized"],
}
"""Name -> what it changes of configs/grpo_tiny.yaml."""
for _staleness in (0, 1, 4):
    CELLS[f"staleness_{_staleness}"] = [f"rollout.max_staleness={_staleness}"]
    CELLS[f"staleness_{_staleness}_not_truncated"] = [
        f"rollout.max_staleness={_staleness}",
        "method.importance_cap=1e6",
    ]


def run(cell: str, seeds: list[int], folder: str) -> dict[str, Any]:
    """The row of one cell."""
    rows = []
    for seed in seeds:
        start = time.monotonic()
        gain = summary(folder, f"seed={seed}", *CELLS[cell])["sampled_reward_gain"]
        rows.append({"seed": seed, "gain": gain, "seconds": round(time.monotonic() - start)})
        print(json.dumps({"cell": cell, **rows[-1]}), flush=True)
    return {
        "benchmark": "rl_learning",
        "cell": cell,
        "workload": f"configs/grpo_tiny.yaml with {', '.join(CELLS[cell])}",
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": versions("torch", "transformers", "ray"),
        "ours": round(fmean(row["gain"] for row in rows), 4),
        "baseline": 0.0,
        "ratio": None,
        "unit": "gain in held-out reward over the model before RL, sampled at temperature 1, mean of the seeds",
        "seeds": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--out", type=Path, default=RESULTS / "rl_learning.json")
    options = parser.parse_args()
    results = {row["cell"]: row for row in json.loads(options.out.read_text())} if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"] = folder
        os.environ["METAFLOW_USER"] = "benchmark"
        os.environ["METAFLOW_CLIENT_CACHE_PATH"] = str(Path(folder, "cache"))
        for cell in options.cells:
            results[cell] = run(cell, options.seeds, folder)
            options.out.write_text(json.dumps(list(results.values()), indent=2) + "\n")


if __name__ == "__main__":
    main()
