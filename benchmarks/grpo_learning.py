"""Does GRPO raise held-out reward? Three seeds of the default flow beside a run that does not train.

The baseline of each seed is the same flow with `optim.lr=0`: same data, warm-up,
rollouts and evaluation noise, no learning. Prints one JSON line per seed and writes
benchmarks/results/grpo_learning.json.

    python benchmarks/grpo_learning.py [--seeds 0 1 2]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "grpo_learning.json"


def summary(folder: str, *overrides: str) -> dict[str, Any]:
    """Run the default flow with overrides and return its `summary` artifact."""
    from metaflow import Run, namespace

    run_id = Path(folder, "run_id")
    options = [word for override in overrides for word in ("--config-value", override)]
    flow = [sys.executable, str(ROOT / "flows" / "grpo_flow.py"), *options, "run", "--run-id-file", str(run_id)]
    with open(Path(folder, "log"), "a") as log:
        subprocess.run(flow, cwd=folder, check=True, stdout=log, stderr=subprocess.STDOUT)
    namespace(None)
    return Run(f"GRPOFlow/{run_id.read_text()}").data.summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"] = folder
        os.environ["METAFLOW_USER"] = "benchmark"
        os.environ["METAFLOW_CLIENT_CACHE_PATH"] = str(Path(folder, "cache"))
        for seed in seeds:
            trained = summary(folder, f"seed={seed}")["sampled_reward_gain"]
            untrained = summary(folder, f"seed={seed}", "optim.lr=0")["sampled_reward_gain"]
            rows.append({"seed": seed, "ours": trained, "baseline": untrained})
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "benchmark": "grpo_learning",
        "workload": "configs/grpo_tiny.yaml: sort 4-8 digits, 1.06M-parameter Qwen3, 40 GRPO steps of 64 x 8",
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "ray", "metaflow")},
        "ours": round(fmean(row["ours"] for row in rows), 4),
        "baseline": round(fmean(row["baseline"] for row in rows), 4),
        "ratio": None,
        "unit": "gain in held-out reward, sampled at temperature 1 (256 rows x 4)",
        "seeds": rows,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps([result], indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
