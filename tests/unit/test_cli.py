"""The command line: quick to answer, one message for an error with a known cause, a table for a person."""

import json
import re
import subprocess
import sys
import tomllib
from contextlib import chdir
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from posttrain import __version__ as version
from posttrain import cli, storage
from posttrain.workflow import registry
from posttrain.workflow.ledger import Ledger
from posttrain.workflow.ledger_file import LedgerFile
from runs import ROOT, SMALL
from tiny import tiny_model


def posttrain(*words, cwd="."):
    """A command in this process, which is quicker by the seconds that its imports take."""
    with chdir(cwd):
        shown = CliRunner().invoke(cli.app, list(map(str, words)), terminal_width=80)
    if shown.exception is not None and not isinstance(shown.exception, SystemExit):
        raise shown.exception
    return SimpleNamespace(returncode=shown.exit_code, stdout=shown.stdout, stderr=shown.stderr)


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


def test_the_command_finds_a_plug_in_where_it_is_typed_or_in_its_flows(tmp_path):
    (tmp_path / "flows").mkdir()
    run = "sys.argv[1:] = ['--version']\ntry: main()\nfinally: print(sys.path[-2:])"
    code = f"import sys; from posttrain.cli import main\n{run}"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[1] == str([str(tmp_path), str(tmp_path / "flows")])


def test_the_installed_command_is_this_one():
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["posttrain"]
    module, _, name = script.partition(":")
    assert callable(getattr(import_module(module), name))


COMMANDS = ["init", "doctor", "preview", "plan", "audit", "verify", "export", "lineage", "chat", "registry"]
HELP = [[], *([name] for name in COMMANDS), ["registry", "show"], ["registry", "rollback"]]


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("words", HELP, ids=lambda words: " ".join(words) or "posttrain")
def test_help_is_whole_on_a_narrow_terminal(words, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = posttrain(*words, "--help")
    assert shown.returncode == 0 and not shown.stderr
    assert "…" not in shown.stdout and max(map(len, shown.stdout.splitlines())) <= columns
    commands, told = _below(words), re.findall(r"^│ (\w+) +\S", shown.stdout, re.M)
    assert {name for name in told if name.islower()} == set(commands)
    assert all(command.help for command in commands.values())


def _below(words):
    """The commands under a command."""
    command = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]
    return getattr(command, "commands", {})


def test_the_commands_are_those_that_the_documentation_names():
    assert sorted(_below([])) == sorted(COMMANDS)


def test_every_command_that_reports_has_json():
    for name in set(COMMANDS) - {"chat", "registry"}:
        assert "--json" in posttrain(name, "--help").stdout, name


def test_no_words_are_answered_with_the_help():
    shown = posttrain()
    assert shown.returncode == 2 and "Usage:" in shown.stdout + shown.stderr


def test_the_version_is_that_of_the_package():
    assert posttrain("--version").stdout == f"posttrain {version}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chat", "nowhere"], "ModelError: nowhere/config.json does not exist"),
        (["verify", "nowhere"], "ModelError: "),
        (["export", "nowhere", "out"], "CheckpointError: "),
        (["audit", "nowhere"], "CheckpointError: "),
        (["plan", "nowhere.yaml"], "ConfigError: --config nowhere.yaml: no such file"),
        (["init", "ppo", "folder"], "ConfigError: posttrain init ppo: no recipe of that name; one of sft, dpo"),
        (["registry", "rollback", "nowhere", "--reason", "rude"], "CheckpointError: "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_known_error_is_one_message_on_stderr_and_status_1(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = posttrain(*words)
    assert shown.returncode == 1 and not shown.stdout
    assert shown.stderr.startswith(message) and shown.stderr.count("\n") == 1, shown.stderr


def test_an_error_that_nobody_foresaw_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("steps.init.init", lambda *words: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        posttrain("init", "sft", "folder")


def test_audit_as_json_is_what_was_proved(root):
    shown = posttrain("audit", root, "--json")
    proved = json.loads(shown.stdout)
    assert proved["stages"]["grpo"]["dropped"] == {"reward_error": 1} and proved["equal"] is None


def test_preview_as_json_is_the_report(config, monkeypatch):
    monkeypatch.chdir(config.parent)
    report = json.loads(posttrain("preview", config.name, "--json").stdout)
    assert report["sources"] and report["pack_tokens"] == 128


def test_a_config_of_the_retrain_flow_is_read_with_its_own_section(tmp_path):
    shown = posttrain("plan", ROOT / "configs" / "retrain_tiny.yaml", "--json")
    assert shown.returncode == 0, shown.stderr
    shown = posttrain("plan", ROOT / "configs" / "retrain_tiny.yaml", "--config-value", "retrain.marign=1")
    assert 'ConfigError: retrain.marign: unknown key; did you mean "margin"?' in shown.stderr


def test_audit_prints_what_was_proved(root):
    done = posttrain("audit", root)
    assert done.returncode == 0, done.stderr
    assert f"{root}: every draw is accounted for" in done.stdout
    line = next(line for line in done.stdout.splitlines() if "grpo" in line)
    assert re.split(r"\s{2,}", line.strip()) == ["grpo", "3", "3", "1 reward_error", "-", "-"]


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
def config(tmp_path, monkeypatch):
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(SMALL))
    monkeypatch.syspath_prepend(str(ROOT / "tests"))  # for small_task
    return path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.yaml"], "ConfigError: --config nowhere.yaml: no such file"),
        (["small.yaml", "--config-value", "optim.lrr=1"], 'ConfigError: optim.lrr: unknown key; did you mean "lr"?'),
        (["small.yaml", "--config-value", "optim.lr"], "ConfigError: --config-value optim.lr: write it as key=value"),
        (
            ["small.yaml", "--config-value", "reward.function=small_task:rewrd"],
            "ConfigError: reward.function: small_task:rewrd: small_task has no 'rewrd'; it has ",
        ),
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
    assert "do not reach" not in done.stdout, "all 40 rows were drawn"
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


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_no_number_of_a_table_is_cut_on_a_narrow_terminal(columns, config, root, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    plan = ["plan", ROOT / "configs" / "grpo_tiny.yaml"]
    stages = json.loads(posttrain(*plan, "--json").stdout)["stages"]
    sources = json.loads(posttrain("preview", config.name, "--json", cwd=config.parent).stdout)["sources"]
    shown = {tuple(words): posttrain(*words, cwd=config.parent).stdout for words in (plan, ["preview", config.name])}
    planned, previewed = shown.values()
    for number in [stage[key] for stage in stages for key in ("tokens_per_step", "tokens_per_s")]:
        assert f"{number:,.0f}" in planned, number
    for number in [source[key] for source in sources for key in ("rows", "units", "tokens")]:
        assert f"{number:,}" in previewed, number
    for text in (*shown.values(), posttrain("audit", root).stdout):
        assert "…" not in text
    assert all(heading in previewed for heading in ("unknown", "duplicates", "shortest", "longest"))


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


def test_chat_answers_each_line_with_text_alone(tmp_path):
    folder = tiny_model(tmp_path)
    words = ["chat", str(folder), "--max-new-tokens", "20"]
    shown = CliRunner().invoke(cli.app, words, input="sort 312\nsort 21\n\nnever read\n")
    assert shown.exit_code == 0 and shown.stdout.strip()
    assert all(each.isprintable() or each in "\n\t" for each in shown.stdout), "random weights write control bytes"
    assert not shown.stderr, "no progress bar of a library"
