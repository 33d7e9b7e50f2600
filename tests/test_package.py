"""The wheel as a user gets it: what is in it, and that it runs where this checkout was never seen."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

import posttrain
from runs import ROOT


def test_the_version_is_semantic_and_stands_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+", posttrain.__version__)
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    assert f"\n## {posttrain.__version__} " in (ROOT / "CHANGELOG.md").read_text(), "the changelog knows this version"


def test_the_release_workflow_publishes_by_trusted_publishing_what_it_has_checked():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    assert jobs["publish"]["needs"] == "check" and jobs["check"]["needs"] == "build"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    for script in (step["run"] for job in jobs.values() for step in job["steps"] if "run" in step):
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0 and "password" not in script


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built in this environment, without a network."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_holds_the_library_its_types_and_what_init_copies(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"posttrain/py.typed", "posttrain/cli.py", "posttrain/data/templates/chatml.jinja", "steps/grpo.py"} <= names
    assert {"posttrain_project/flows/base.py", "posttrain_project/configs/grpo_tiny.yaml"} <= names
    assert "posttrain_project/docs/config.md" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs")) or "__pycache__" in name]


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A new virtual environment that sees the packages of this one, but not this checkout; the wheel is in it."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [folder / "bin" / "python", "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel]
    subprocess.run(list(map(str, install)), check=True, capture_output=True)
    theirs = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (theirs / "main.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after pip, which would look there too
    return folder / "bin"


def clean(folder: Path) -> dict[str, str]:
    """No path to this checkout, and Metaflow's files in `folder`."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and not key.startswith("METAFLOW_")}
    return kept | {"METAFLOW_HOME": str(folder / "metaflow")}


def run(command: list[object], cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=clean(cwd), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_user_of_the_wheel_makes_a_folder_looks_and_trains(environment, tmp_path):
    where = run([environment / "python", "-c", "import posttrain, steps; print(posttrain.__file__)"], tmp_path)
    assert str(environment.parent) in where
    assert "init" in run([environment / "posttrain", "--help"], tmp_path)
    made = json.loads(run([environment / "posttrain", "init", "sft", "mine", "--json"], tmp_path))
    checks = subprocess.run(
        [environment / "posttrain", "doctor", "--json"],
        cwd=tmp_path,
        env=clean(tmp_path),
        capture_output=True,
        text=True,
    )
    assert "transformers" in {check["name"] for check in json.loads(checks.stdout)}
    few = ["optim.num_steps=6", "model.fresh.hidden_size=32", "model.fresh.num_layers=1", "eval.samples=1"]
    words = [word for change in few for word in ("--config-value", change)]
    printed = run([environment / "python", "flows/sft_flow.py", "run", *words], tmp_path / made["folder"])
    assert "exported model: " in printed
