"""Do the recipes on rows learn their tiny tasks? Three seeds of every flow, the trained model beside the untrained.

The baseline of each run is the model that its recipe started from (of DPO and of the reward model that after the
warm-up), on the same held-out rows with the same sampling noise. Prints one JSON line a run and, at the end, the table
of docs/recipes.md; writes benchmarks/results/recipes_learning.json.

    python benchmarks/recipes_learning.py [--seeds 0 1 2] [--recipes sft dpo reward distill] [--out FILE]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "recipes_learning.json"
FLOWS = {"sft": "SFTFlow", "dpo": "DPOFlow", "reward": "RewardFlow", "distill": "DistillFlow"}
MEASURES = {"sft": "sampled_reward", "dpo": "sampled_reward", "reward": "accuracy", "distill": "sampled_reward"}
"""What a recipe is judged by; the results hold all of its measures."""


def run(recipe: str, seed: int, folder: str) -> dict[str, Any]:
    """Run a flow as it is, but for its seed; its measures before and after, and its seconds."""
    from metaflow import Run, namespace

    run_id = Path(folder, "run_id")
    flow = [sys.executable, str(ROOT / "flows" / f"{recipe}_flow.py"), "--config-value", f"seed={seed}", "run"]
    start = time.monotonic()
    with open(Path(folder, "log"), "a") as log:
        command = [*flow, "--run-id-file", str(run_id)]
        subprocess.run(command, cwd=folder, check=True, stdout=log, stderr=subprocess.STDOUT)
    seconds = time.monotonic() - start
    namespace(None)
    rows = Run(f"{FLOWS[recipe]}/{run_id.read_text()}").data.summary["rows"]
    (judged,) = (row for row in rows if row["measure"] == MEASURES[recipe])
    found = {"recipe": recipe, "seed": seed, "ours": judged["after"], "baseline": judged["before"]}
    return found | {"seconds": round(seconds), "measures": rows}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a line a recipe, a column a seed."""
    seeds = [row["seed"] for row in results[0]["seeds"]]
    head = ["recipe", "measure", "before, mean", *(f"after, seed {seed}" for seed in seeds), "seconds a flow"]
    lines = [head, ["---"] * len(head)]
    for found in results:
        rows, measure = found["seeds"], found["unit"].split()[0]
        before, after = f"{found['baseline']:.2f}", [f"{row['ours']:.2f}" for row in rows]
        lines.append([rows[0]["recipe"], measure, before, *after, f"{fmean(row['seconds'] for row in rows):.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=FLOWS, default=list(FLOWS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"] = folder
        os.environ["METAFLOW_USER"] = "benchmark"
        os.environ["METAFLOW_CLIENT_CACHE_PATH"] = str(Path(folder, "cache"))
        for recipe in options.recipes:
            rows = []
            for seed in options.seeds:
                rows.append(run(recipe, seed, folder))
                print(json.dumps(rows[-1]), flush=True)
            results.append(
                {
                    "benchmark": "recipes_learning",
                    "workload": f"configs/{recipe}_tiny.yaml: sort 4-8 digits",
                    "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
                    "versions": {name: version(name) for name in ("torch", "transformers", "ray", "metaflow")},
                    "ours": round(fmean(row["ours"] for row in rows), 4),
                    "baseline": round(fmean(row["baseline"] for row in rows), 4),
                    "ratio": None,
                    "unit": f"{MEASURES[recipe]} on held-out rows, mean of the seeds",
                    "seeds": rows,
                }
            )
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
