"""What a flow costs beside Metaflow is what its many processes import: one for a task, two and more for a card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import FLOWS, ROOT, printed

HEAVY = {"pydantic", "posttrain.config", "posttrain.config_file", "steps.plan", "boto3", "botocore"}
HEAVY |= {"torch", "numpy", "pyarrow", "transformers", "ray", "vllm"}
TELL = f"""
import atexit, json, os, sys

def tell():
    with open(os.environ["LOADED"], "a") as file:
        print(json.dumps([sys.argv, sorted({HEAVY!r} & sys.modules.keys())]), file=file)

atexit.register(tell)
"""
"""Run in every Python process whose path it is on: what it was called with, and what of HEAVY it had at its end."""


@pytest.mark.parametrize("module", [*(flow.stem for flow in FLOWS), "steps.report"])
def test_a_flow_and_its_last_step_import_nothing_heavy(module: str):
    code = f"import sys, {module}; print(sorted({HEAVY!r} & sys.modules.keys()))"
    search = os.pathsep.join([str(ROOT / "flows"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": search}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_only_the_process_that_reads_the_yaml_imports_the_schema(home, monkeypatch):
    (home / "sitecustomize.py").write_text(TELL)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("LOADED", str(home / "loaded"))
    printed(Path(__file__).parent / "light_flow.py", ["run"], home)
    loaded: dict[str, list[list[str]]] = {"step": [], "card": [], "run": []}
    for argv, found in map(json.loads, (home / "loaded").read_text().splitlines()):
        if kind := next((word for word in argv if word in loaded), None):
            loaded[kind].append(found)
    assert loaded["step"] == [[], []]
    assert len(loaded["card"]) >= 2 and not any(loaded["card"])
    assert loaded["run"] == [["posttrain.config", "posttrain.config_file", "pydantic"]]
