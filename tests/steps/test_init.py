"""`posttrain init`: a folder that runs as it is, and names nothing of the built-in task any more."""

import json
import re
import shlex

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.config_file import load_config
from posttrain.data.reward import RewardWorker
from posttrain.errors import ConfigError, StorageError
from runs import ROOT
from steps import init as init_module
from steps.init import RECIPES, SHARED, init
from test_docs_code import blocks, check_command
from tiny import tiny_model

OF_THEIR_OWN = {"retrain"}
"""Flows whose rows come in day by day: docs/retraining.md."""


def test_every_flow_with_rows_is_a_recipe():
    flows = {path.name.removesuffix("_flow.py") for path in (ROOT / "flows").glob("*_flow.py")}
    assert set(RECIPES) == {name for name in flows - OF_THEIR_OWN if (ROOT / "configs" / f"{name}_tiny.yaml").is_file()}


def test_what_flows_import_of_each_other_is_copied():
    flows, needed, seen = ROOT / "flows", {f"{recipe}_flow.py" for recipe in RECIPES}, set()
    while new := needed - seen:
        seen |= new
        imported = re.findall(r"^(?:from|import) (\w+)", "".join((flows / name).read_text() for name in new), re.M)
        needed |= {f"{name}.py" for name in imported if (flows / f"{name}.py").is_file()}
    assert {name for name in needed if not name.endswith("_flow.py")} == set(SHARED)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_folder_is_whole_and_names_only_what_it_holds(tmp_path, recipe):
    made = init(recipe, tmp_path / "mine")
    folder = tmp_path / "mine"
    text = (folder / "configs" / f"{recipe}.yaml").read_text()
    config = load_config(text)
    assert config.method.name == recipe and "sort_digits" not in text
    for path in re.findall(r"data/\w+\.jsonl", text):
        rows = [json.loads(line) for line in (folder / path).read_text().splitlines()]
        assert 100 < len(rows) <= init_module.ROWS and path in made["files"]
    assert f'"{recipe}.yaml"' in (folder / "flows" / f"{recipe}_flow.py").read_text()
    assert "_tiny" not in (folder / "flows" / f"{recipe}_flow.py").read_text()
    assert all((folder / name).is_file() for name in made["files"])
    assert ("my_reward" in text) == (folder / "flows" / "my_reward.py").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_readme_names_commands_and_files_that_there_are(tmp_path, monkeypatch, recipe):
    init(recipe, tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.syspath_prepend(str(tmp_path / "mine" / "flows"))  # as the command does
    text, commands = (tmp_path / "mine" / "README.md").read_text(), []
    for block in blocks(tmp_path / "mine" / "README.md"):
        commands += [shlex.split(line, comments=True) for line in block.text.splitlines()]
    for words in commands:
        check_command(words, where=f"README.md of {recipe}")
    (preview,) = [words[1:] for words in commands if words[:2] == ["posttrain", "preview"]]
    shown = CliRunner().invoke(app, [*preview, "--config-value", "optim.num_steps=10"])
    assert shown.exit_code == 0, shown.output
    config, rows = yaml.safe_load((tmp_path / "mine" / preview[1]).read_text()), re.findall(r"^\| (.*) \|$", text, re.M)
    for _, where, key, _ in (row.split(" | ") for row in rows[2:]):
        value = config
        for part in key.strip("`").split("."):
            value = value[part]
        assert (tmp_path / "mine" / where.strip("`")).is_file()
        if where.startswith("`data/"):
            assert value == where.strip("`"), key
    assert all((ROOT / page).is_file() for page in re.findall(r"`(docs/\w+\.md)`", text))
    assert ("posttrain chat" in text) == (recipe != "reward"), "a reward model writes no text"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_that_is_trained_takes_the_place_of_the_fresh_one_as_the_readme_says(tmp_path, monkeypatch, recipe):
    init(recipe, tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    model = str(tiny_model(tmp_path / "model"))
    text, changes = (tmp_path / "mine" / "README.md").read_text(), []
    for key in re.findall(r"`([\w.]+)\.path: FOLDER`", text):
        changes += [f"{key}.path={model}", f"{key}.fresh=null"]
    changes += ["warmup=null"] if "`warmup: null`" in text else []
    words = [word for change in changes for word in ("--config-value", change)]
    planned = CliRunner().invoke(app, ["plan", f"configs/{recipe}.yaml", *words])
    assert changes and planned.exit_code == 0, planned.output


def test_the_config_says_what_the_recipes_own_says_but_for_rows_and_reward(tmp_path):
    init("grpo", tmp_path / "mine")
    ours = load_config((ROOT / "configs" / "grpo_tiny.yaml").read_text()).model_dump()
    theirs = load_config((tmp_path / "mine" / "configs" / "grpo.yaml").read_text()).model_dump()
    assert {key for key in ours if ours[key] != theirs[key]} == {"data", "reward"}
    assert {key for key in ours["data"] if ours["data"][key] != theirs["data"][key]} == {
        "sources",
        "prompts",
        "held_out",
    }


def test_the_copied_reward_judges_the_copied_rows(tmp_path, monkeypatch):
    init("grpo", tmp_path / "mine")
    monkeypatch.syspath_prepend(str(tmp_path / "mine" / "flows"))
    row = json.loads((tmp_path / "mine" / "data" / "prompts.jsonl").read_text().splitlines()[0])
    scored = RewardWorker("my_reward:reward").score(row, [row["answer"], "no"])
    assert [value for value, _ in scored] == [1.0, 0.0]


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        init("sft", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="name a folder that can be made"):
        init("sft", tmp_path / "file" / "mine")


def test_the_command_says_what_to_type_next_and_preview_then_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["init", "sft", "mine"])
    assert shown.exit_code == 0, shown.output
    assert "python flows/sft_flow.py run" in shown.stdout
    monkeypatch.chdir(tmp_path / "mine")
    previewed = CliRunner().invoke(app, ["preview", "configs/sft.yaml"])
    assert previewed.exit_code == 0, previewed.output
    assert "2,048" in previewed.stdout
    assert "Rows that these draws do not reach were not looked at" in previewed.stdout
