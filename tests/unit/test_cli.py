"""The command line: quick to answer, one message for an error with a known cause, a table for a person."""

import json
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from posttrain import storage
from posttrain.workflow import registry
from posttrain.workflow.ledger import Ledger
from posttrain.workflow.ledger_file import LedgerFile
from runs import ROOT, SMALL


def posttrain(*words, cwd=None):
    command = [sys.executable, "-m", "posttrain.cli", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.fixture
def root(tmp_path):
    """A run of three sampled batches, of which one draw was dropped."""
    return write_run(tmp_path / "one", fails={2})


def write_run(root, *, fails):
    config = {"model": {"path": "m"}, "data": {"prompts": "x:y", "held_out": "x:y"}, "reward": {"function": "x:y"}}
    file, ledger = LedgerFile(str(root / "ledger" / "grpo.jsonl")), Ledger()
    file.restore(0)
    (root / "config.json").write_text(json.dumps(config))
    while file.step < 3:
        if ledger.draw() in fails:
            ledger.drop("reward_error")
        else:
            file.append({"step": file.step, **ledger.commit([], draws=[ledger.drawn - 1])})
    return root


def test_importing_the_command_line_is_light():
    heavy = ["torch", "ray", "transformers", "pyarrow", "numpy", "metaflow", "boto3", "steps"]
    code = f"import sys, posttrain.cli; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_installed_command_is_this_one():
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["posttrain"]
    module, _, name = script.partition(":")
    assert callable(getattr(import_module(module), name))


def test_help_names_the_commands():
    shown = posttrain("--help").stdout
    assert "preview" in shown and "audit" in shown and "plan" in shown


def test_audit_prints_what_was_proved(root):
    done = posttrain("audit", root)
    assert done.returncode == 0, done.stderr
    assert f"{root}: every draw is accounted for" in done.stdout
    line = next(line for line in done.stdout.splitlines() if "grpo" in line)
    assert [cell.strip() for cell in line.strip("│").split("│")] == ["grpo", "3", "3", "1 reward_error", "-", "-"]


def test_audit_takes_a_path_from_where_it_is_typed(root):
    assert posttrain("audit", ".", "--no-replay", cwd=root).returncode == 0


def test_a_false_ledger_is_one_line_on_stderr_and_status_1(root):
    path = root / "ledger" / "grpo.jsonl"
    path.write_text(path.read_text().replace('"reward_error":1', '"reward_error":3'))
    done = posttrain("audit", root)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("CheckpointError: ") and done.stderr.count("\n") == 1
    assert "grpo.jsonl, step 2: " in done.stderr


def test_audit_of_two_runs_says_where_they_part(root, tmp_path):
    same, other = write_run(tmp_path / "same", fails={2}), write_run(tmp_path / "other", fails={1})
    done = posttrain("audit", root, same)
    assert done.returncode == 0 and f"equal to {same}, step by step" in done.stdout
    done = posttrain("audit", root, other)
    assert done.returncode == 1
    assert "grpo: step 1 is the first that differs, in its draws" in done.stdout


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(SMALL))
    shutil.copy(ROOT / "tests" / "small_task.py", tmp_path)  # a plug-in lies where the command is typed
    return path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.yaml"], "ConfigError: --config nowhere.yaml: no such file"),
        (["small.yaml", "--config-value", "optim.lrr=1"], 'ConfigError: optim.lrr: unknown key; did you mean "lr"?'),
        (["small.yaml", "--config-value", "optim.lr"], "ConfigError: --config-value optim.lr: write it as key=value"),
    ],
)
def test_a_wrong_config_is_one_message(config, words, said):
    done = posttrain("preview", *words, cwd=config.parent)
    assert done.returncode == 1 and done.stderr.startswith(said) and "Traceback" not in done.stderr


def test_preview_shows_the_data_of_a_config_with_its_overrides(config):
    (config.parent / "own.jsonl").write_text("".join(f"{json.dumps(record(n))}\n" for n in range(40)))
    words = ["--config-value", "data.sources=own.jsonl", "--config-value", "data.pack_tokens=256"]
    before = files(config.parent)
    done = posttrain("preview", config.name, *words, cwd=config.parent)
    assert done.returncode == 0, done.stderr
    assert "own.jsonl" in done.stdout and "40" in done.stdout and "256" in done.stdout
    assert files(config.parent) == before, "a preview leaves nothing behind"


def record(n):
    return {"messages": [{"role": "user", "content": f"sort {n}"}, {"role": "assistant", "content": str(n)}]}


def files(folder: Path):
    return sorted(path.name for path in folder.rglob("*") if "__pycache__" not in path.parts)


def test_plan_prints_a_table_or_json_and_its_verdict_is_the_exit_status(tmp_path):
    small = ROOT / "configs" / "grpo_tiny.yaml"
    done = posttrain("plan", small, "--gpus", 1, "--gpu", "l4", "--price", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"] is True
    wide = {"hidden_size": 8192, "num_layers": 40, "num_heads": 64, "num_kv_heads": 8}
    words = [word for key, value in wide.items() for word in ("--config-value", f"model.fresh.{key}={value}")]
    done = posttrain("plan", small, "--gpus", 1, "--gpu", "l4", *words)
    assert done.returncode == 1 and not done.stderr, done.stderr
    assert "does not fit" in done.stdout and "bfloat16_stochastic" in done.stdout


def test_registry_shows_the_champion_and_goes_back_to_its_parent(tmp_path):
    for number, parent in ((1, None), (2, 1)):
        export = tmp_path / "export" / str(number)
        with storage.staging(str(export)) as folder:
            (folder / "model.safetensors").write_bytes(bytes(number))
            storage.publish(folder, str(export))
        made = registry.Candidate(run=f"Flow/{number}", parent=parent, model_uri=str(export), key=str(number))
        registry.promote(str(tmp_path / "champions"), made)
    shown = posttrain("registry", "show", "champions", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert f"version 2 is champion: {tmp_path}/champions/models/Flow/2" in shown.stdout
    back = posttrain("registry", "rollback", "champions", "--reason", "rude", "--json", cwd=tmp_path)
    assert json.loads(back.stdout) == {"outcome": "rolled back", "champion": 1}
    told = json.loads(posttrain("registry", "show", "champions", "--json", cwd=tmp_path).stdout)
    assert told["champion"]["run"] == "Flow/1" and told["history"][-1]["reason"] == "rude"
    again = posttrain("registry", "rollback", "champions", "--reason", "rude", cwd=tmp_path)
    assert again.returncode == 1 and "CheckpointError" in again.stderr and "first of its line" in again.stderr
    assert "no champion" in posttrain("registry", "show", "nowhere", cwd=tmp_path).stdout
