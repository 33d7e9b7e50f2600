"""The flows of the recipes on rows, as a person runs them: small, from any folder, to an export that opens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runs import ROOT, SMALL_RECIPE, SMALL_ROWS

SHOWN = {
    "sft": ["loss, nats per token or pair", "reward, greedy", "solved by one of 4 samples", "By slice"],
    "dpo": ["chosen answer likelier", "margin of the chosen", "By slice"],
    "reward": ["accuracy against the labels", "By slice", "By the margin of the pair", "How sure and how right: after"],
    "distill": ["divergence from the teacher", "reward, greedy", "By slice"],
}
SLICED = {name: f"small_task:sliced_{'sft' if name == 'distill' else name}" for name in SHOWN}


def environment(folder: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"METAFLOW_HOME": str(folder / "home"), "PYTHONPATH": paths}


def overrides(name: str) -> dict[str, object]:
    asked = {} if name == "reward" else {"eval.prompts": "small_task:held_out", "reward.function": "small_task:reward"}
    return {"base": str(ROOT / "configs" / f"{name}_tiny.yaml"), **SMALL_RECIPE, **SMALL_ROWS[name], **asked}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [("sft", {}), ("dpo", {}), ("reward", {}), ("distill", {}), ("distill", {"method.top_k": 8})],
    ids=["sft", "dpo", "reward", "distill", "distill offline"],
)
def test_a_recipe_runs_from_its_config_to_its_export(tmp_path: Path, name: str, more: dict[str, object]):
    flow = [sys.executable, str(ROOT / "flows" / f"{name}_flow.py"), "--config-value", "config"]
    env = environment(tmp_path)
    changes = overrides(name) | more | {"data.held_out": SLICED[name], "eval.slice_by": "slice"}
    command = [*flow, json.dumps(changes), "run", "--run-id-file", "run_id"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"{name} 6/6" in done.stdout and "exported model: " in done.stdout
    assert all(label in done.stdout for label in SHOWN[name])
    assert "Traceback" not in done.stdout and "Warning" not in done.stdout
    (export,) = (tmp_path / "runs").glob("*/*/export")
    (entry,) = json.loads((export / "lineage.json").read_text())
    assert entry["method"] == name and len(entry["ledger"]) == 64
    card = (export / "README.md").read_text()
    assert "### By slice" in card and "license: unknown" in card and "small_task:" in card


@pytest.mark.slow
def test_a_gate_ends_the_run_before_its_export(tmp_path: Path):
    rate = {"optim.lr": 1.0}  # so large that six steps do harm
    sliced = {"data.held_out": SLICED["sft"], "eval.slice_by": "slice"}
    gate = {"eval.gate": {"loss": 0, "loss[slice=long]": 0, "loss[slice=short]": 1e9}}
    changes = overrides("sft") | {"eval.prompts": None, "reward": None} | sliced | gate | rate
    flow = [sys.executable, str(ROOT / "flows" / "sft_flow.py"), "--config-value", "config", json.dumps(changes), "run"]
    env = environment(tmp_path)
    done = subprocess.run(flow, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode != 0 and "GateError: eval.gate: loss went from" in done.stdout
    assert "; loss[slice=long] went from" in done.stdout and "loss[slice=short] went" not in done.stdout
    assert not list((tmp_path / "runs").glob("*/*/export"))
