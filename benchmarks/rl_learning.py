"""Does what RL learns depend on the method, or on how stale the weights are? The default task, once a cell and seed.

Cells: the published methods of docs/rl.md on the default's hyperparameters, and staleness 0, 1 and 4 with the default's
correction of what the sampler's weights differ by and without any, and 4 with two cures. All cells of a seed go on from
one model, which the warm-up made, by the same steps as in the flow. The baseline is that model, on the same held-out
rows and sampling noise. Prints a JSON line a run and writes benchmarks/results/rl_learning.json; cells that are not
asked for stay in it as they are.

    python -m benchmarks.rl_learning [--seeds 0 1 2] [--cells staleness_1 gspo]
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

from benchmarks.inputs import prepared
from benchmarks.report import RESULTS, versions

ROOT = Path(__file__).resolve().parent.parent
CELLS: dict[str, dict[str, Any]] = {f"staleness_{k}": {"rollout.max_staleness": k} for k in (0, 1, 4)}
"""Name -> what it changes of configs/grpo_tiny.yaml."""
CELLS |= {f"staleness_{k}_uncorrected": {"rollout.max_staleness": k, "method.loss": "uncorrected"} for k in (0, 1, 4)}
CELLS |= {
    "staleness_4_clipped": {"rollout.max_staleness": 4, "method.loss": "clipped"},
    "staleness_4_slow": {"rollout.max_staleness": 4, "optim.lr": 5e-5},
}
CELLS |= {
    "grpo": {"method.advantage": "normalized", "method.loss": "clipped", "method.weigh": "sequence"},
    "dr_grpo": {"method.loss": "clipped"},
    "dapo": {
        "method.advantage": "normalized",
        "method.loss": "clipped",
        "method.clip": [0.2, 0.28],
        "method.replace_silent": True,
        "method.overlong_tokens": 4,
    },
    "rloo": {"method.advantage": "leave_one_out"},
    "reinforce++": {"method.advantage": "batch_normalized", "method.loss": "clipped"},
    "gspo": {
        "method.advantage": "normalized",
        "method.loss": "sequence",
        "method.weigh": "sequence",
        "method.clip": [3e-4, 4e-4],
    },
    "cispo": {"method.advantage": "normalized"},
    "ppo": {"method.advantage": "gae", "method.loss": "clipped", "method.epochs": 2},
    "on_policy_distillation": {"method.advantage": "teacher"},
}
TEACHER = "staleness_0"
"""The cell whose result of the same seed teaches on_policy_distillation."""


class Start:
    """What all cells of a seed begin with: data, tokens, and the model after the warm-up.

    Args:
        common: what the run changes of configs/grpo_tiny.yaml, whatever the cell.
    """

    def __init__(self, folder: Path, seed: int, common: dict[str, Any] | None = None):
        from steps.train import train

        self.folder, self.seed, self.trained, self.common = folder, seed, {}, common or {}
        config = configured(seed, self.common)
        inputs = prepared(config, folder / "start")
        self.tokens_uri = inputs.tokens_uri
        warm = train(config, **inputs.plain())
        assert warm is not None
        self.model_uri = warm["model_uri"]

    def run(self, cell: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the cell learns from here; its changes are those of CELLS where none are given."""
        from steps.evaluate import evaluate
        from steps.grpo import grpo

        start, teacher_uri = time.monotonic(), None
        changes = CELLS[cell] if changes is None else changes
        if changes.get("method.advantage") == "teacher":
            if TEACHER not in self.trained:
                self.run(TEACHER)
            teacher_uri = self.trained[TEACHER]
            changes = changes | {"method.teacher": teacher_uri}
        config = configured(self.seed, self.common | changes)
        uris = {"model_uri": self.model_uri, "tokens_uri": self.tokens_uri}
        result = grpo(config, root=str(self.folder / cell), teacher_uri=teacher_uri, **uris)
        assert result is not None
        self.trained[cell] = result["model_uri"]
        models = {"before": self.model_uri, "after": result["model_uri"]}
        self.found = found = evaluate(config, tokens_uri=self.tokens_uri, models=models)
        before, after = (found[name]["sampled_reward"] for name in models)
        self.metrics = [json.loads(line) for line in Path(result["metrics"]).read_text().splitlines()]
        steps = self.metrics
        return {
            "seed": self.seed,
            "before": before,
            "after": after,
            "staleness_mean": round(fmean(step["rollout/staleness_mean"] for step in steps), 3),
            "curve": [[n, round(step["eval/reward"], 4)] for n, step in enumerate(steps, 1) if "eval/reward" in step],
            "seconds": round(time.monotonic() - start),
        }


def configured(seed: int, changes: dict[str, Any]) -> Any:
    """The default config with changes."""
    from posttrain.config_file import load_config

    return load_config(json.dumps({"base": str(ROOT / "configs" / "grpo_tiny.yaml"), "seed": seed, **changes}))


def described(cell: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of one cell."""
    return {
        "benchmark": "rl_learning",
        "cell": cell,
        "workload": f"configs/grpo_tiny.yaml with {json.dumps(CELLS[cell])}",
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": versions("torch", "transformers", "ray"),
        "ours": round(fmean(row["after"] for row in rows), 4),
        "baseline": round(fmean(row["before"] for row in rows), 4),
        "ratio": None,
        "unit": "held-out reward at temperature 1, mean of the seeds; baseline: the same model before RL",
        "seeds": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--out", type=Path, default=RESULTS / "rl_learning.json")
    options = parser.parse_args()
    results = {row["cell"]: row for row in json.loads(options.out.read_text())} if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        starts = [Start(Path(folder, str(seed)), seed) for seed in options.seeds]
        for cell in options.cells:
            rows = []
            for start in starts:
                rows.append(start.run(cell))
                print(json.dumps({"cell": cell, **rows[-1]}), flush=True)
            results[cell] = described(cell, rows)
            options.out.write_text(json.dumps([results[name] for name in CELLS if name in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
