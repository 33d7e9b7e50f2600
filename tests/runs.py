"""Small real runs for tests: the default config shrunk until a step takes a fraction of a second."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain import storage
from posttrain.config import RunConfig
from posttrain.config_file import load_config

ROOT = Path(__file__).resolve().parents[1]
SMALL: dict[str, Any] = {
    "base": str(ROOT / "configs" / "grpo_tiny.yaml"),
    "model.fresh": {"hidden_size": 32, "num_layers": 2},
    "data.sources": "small_task:demonstrations",
    "data.prompts": "small_task:prompts",
    "data.held_out": "small_task:held_out",
    "reward.function": "small_task:reward",
    "warmup.num_steps": 4,
    "data.pack_tokens": 128,
    "warmup.packs_per_step": 2,
    "optim.num_steps": 6,
    "rollout.prompts_per_step": 4,
    "method.group_size": 4,
    "eval.every_steps": 3,
    "checkpoint.every_steps": 2,
    "parallel.data": 1,
}
TWO_RANKS = {"parallel.data": 2}
"""For tests of what ranks do together: a rank is a process, and costs a test more than all that it computes."""


SMALL_RECIPE: dict[str, Any] = {
    "model.fresh": {"hidden_size": 32, "num_layers": 2},
    "data.pack_tokens": 128,
    "optim.num_steps": 6,
    "eval.every_steps": 3,
    "checkpoint.every_steps": 2,
    "parallel.data": 1,
}
"""On top of configs/<recipe>_tiny.yaml."""
SMALL_ROWS = {
    "sft": {"data.sources": "small_task:exact", "data.held_out": "small_task:held_out_exact"},
    "dpo": {"data.sources": "small_task:pairs", "data.held_out": "small_task:held_out_pairs", "warmup.num_steps": 4},
    "reward": {"data.sources": "small_task:pairs", "data.held_out": "small_task:held_out_pairs", "warmup": None},
    "distill": {
        "data.sources": "small_task:exact",
        "data.held_out": "small_task:held_out_exact",
        "warmup.num_steps": 4,
        "method.teacher.fresh": {"hidden_size": 48, "num_layers": 2},
    },
}


def recipe_config(name: str, **overrides: Any) -> RunConfig:
    """A recipe's tiny config, shrunk, and asked no questions; with dotted overrides."""
    base = {"base": str(ROOT / "configs" / f"{name}_tiny.yaml"), "eval.prompts": None, "reward": None}
    return load_config(json.dumps(base | SMALL_RECIPE | SMALL_ROWS[name] | overrides))


def small_config(**overrides: Any) -> RunConfig:
    """The small run with dotted overrides: small_config(**{"optim.lr": 0})."""
    return load_config(json.dumps(SMALL | overrides))


@dataclass(frozen=True)
class Prepared:
    """A run up to and including tokenisation."""

    root: Path | str
    model_uri: str
    tokens_uri: str
    teacher_uri: str | None = None


def prepared(root: Path | str, config: RunConfig) -> Prepared:
    """Run prepare, tokenize and merge_tokens in this process, in a folder or below an s3:// prefix."""
    from steps.merge_tokens import merge_tokens
    from steps.prepare import prepare
    from steps.tokenize import tokenize

    made = prepare(config, root=str(root))
    storage.write_bytes(storage.join(str(root), "config.json"), config.model_dump_json().encode())
    uris = {"root": str(root), "data_uri": made["data"]["uri"], "model_uri": made["model"]["uri"]}
    parts = [tokenize(config, **uris, part=part) for part in made["parts"]]
    tokens = merge_tokens(config, **uris, parts=parts)
    found = {"model_uri": made["model"]["uri"], "teacher_uri": made["teacher_uri"], "tokens_uri": tokens["uri"]}
    return Prepared(root=root, **found)


def run_step(step: str, config: RunConfig, folder: Path, *, fault: str | None = None, **inputs: Any):
    """`python -m steps.<step>` in a process group of its own, as a scheduler would; returns the finished process."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs_file = folder / f"{step}.json"
    inputs_file.write_text(json.dumps({"config": config.model_dump(mode="json"), **inputs}))
    env = {k: v for k, v in os.environ.items() if k != "POSTTRAIN_FAULT"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), env.get("PYTHONPATH", "")])
    if fault:
        env["POSTTRAIN_FAULT"] = fault
    command = [sys.executable, "-m", f"steps.{step}", str(inputs_file)]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=240, start_new_session=True
    )


def result_of(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON that a step printed last."""
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return json.loads(process.stdout[process.stdout.index("\n{\n") :])


def steps_done(folder: Path, stage: str) -> int:
    """Steps on record in a run's metrics."""
    file = folder / "metrics" / f"{stage}.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def steps_again(done: int, resumed: subprocess.CompletedProcess[str]) -> int:
    """Of `done` steps those that a run trained a second time: it went on from the checkpoint that it names."""
    found = re.search(r"continuing after step (\d+) of", resumed.stdout)
    return done - int(found[1] if found else 0)


def metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics file without its clock readings, which no two runs share."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]
