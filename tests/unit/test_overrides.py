"""What a person types after `python flows/grpo_flow.py` becomes what Metaflow understands."""

import json

import pytest

from posttrain.config_file import load_config
from posttrain.errors import ConfigError
from posttrain.overrides import metaflow_arguments


@pytest.fixture
def default(tmp_path):
    path = tmp_path / "default.yaml"
    path.write_text("seed: 0")
    return path


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("seed: 1")
    return path


def document(words):
    """The config document handed to Metaflow, and the words after it."""
    assert words[:2] == ["--config-value", "config"]
    return json.loads(words[2]), words[3:]


def test_words_that_are_not_ours_stay_as_they_are(default):
    words = ["--no-pylint", "run", "--max-workers", "2", "--tag", "config"]
    assert metaflow_arguments(words, default=default) == words


@pytest.mark.parametrize("before", [True, False], ids=["before-run", "after-run"])
def test_a_file_and_a_value_are_accepted_on_both_sides_of_run(default, own, before):
    ours = ["--config", str(own), "--config-value", "optim.lr=0.5"]
    words = [*ours, "run", "--tag", "x"] if before else ["run", *ours, "--tag", "x"]
    found = document(metaflow_arguments(words, default=default))
    assert found == ({"base": str(own), "optim.lr": 0.5}, ["run", "--tag", "x"])


def test_a_value_alone_changes_the_default_config(default):
    found, _ = document(metaflow_arguments(["run", "--config-value", "seed=3"], default=default))
    assert found == {"base": str(default), "seed": 3}


def test_a_file_is_found_from_the_working_directory(default, own, monkeypatch):
    monkeypatch.chdir(own.parent)
    found, _ = document(metaflow_arguments(["--config", "own.yaml", "run"], default=default))
    assert found == {"base": str(own)}


@pytest.mark.parametrize(
    ("text", "value"),
    [("warmup=null", None), ("seed=3", 3), ("optim.betas=[0.9, 0.95]", [0.9, 0.95]), ("a.b=x=y:z", "x=y:z")],
)
def test_a_value_is_read_as_yaml(default, text, value):
    found, _ = document(metaflow_arguments(["run", "--config-value", text], default=default))
    assert found[text.partition("=")[0]] == value


def test_the_last_value_of_a_key_wins(default):
    words = ["run", "--config-value", "seed=3", "--config-value", "seed=4"]
    assert document(metaflow_arguments(words, default=default))[0]["seed"] == 4


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "config", "c.yaml", "run"],
        ["--config-value", "config", "{seed: 3}", "run"],
        ["--config-value", "config", "kv.config", "step", "train"],
    ],
)
def test_metaflows_own_spelling_is_untouched(default, words):
    assert metaflow_arguments(words, default=default) == words


def test_a_value_joins_a_document_in_metaflows_own_spelling(default):
    words = ["--config-value", "config", "{seed: 3}", "run", "--config-value", "optim.lr=0.5"]
    assert document(metaflow_arguments(words, default=default))[0] == {"seed": 3, "optim.lr": 0.5}


def test_a_value_joins_a_file_in_metaflows_own_spelling(default, own):
    words = ["--config", "config", str(own), "run", "--config-value", "optim.lr=0.5"]
    assert document(metaflow_arguments(words, default=default))[0] == {"base": str(own), "optim.lr": 0.5}


def test_a_file_named_twice_is_refused(default, own):
    for second in (["--config", str(own)], ["--config", "config", str(own)], ["--config-value", "config", "{a: 1}"]):
        with pytest.raises(ConfigError, match="a run has one config"):
            metaflow_arguments(["--config", str(own), *second, "run"], default=default)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--config"], "--config needs a value"),
        (["run", "--config-value"], "--config-value needs a value"),
        (["--config", "config"], "--config config needs a value"),
        (["run", "--config-value", "optim.lr"], "--config-value optim.lr: write it as key=value"),
        (["run", "--config-value", "optim.betas=[0.9"], "--config-value optim.betas=[0.9: not YAML"),
        (["--config-value", "config", "{seed: [", "--config-value", "a=1"], "--config-value config takes a YAML or"),
        (["--config-value", "config", "7", "--config-value", "a=1"], "--config-value config takes a YAML or"),
        (["run", "--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
        (["run", "--config", "\0"], "--config '\\x00' is no path: "),
        (["run", "--config", "~nobody-of-this-name/x"], "--config '~nobody-of-this-name/x' is no path: "),
        (["run", "--config-value", "a=&a [*a]"], "--config-value a=&a [*a]: not YAML"),
    ],
)
def test_a_mistake_is_one_message(default, words, message):
    with pytest.raises(ConfigError) as error:
        metaflow_arguments(words, default=default)
    assert str(error.value).startswith(message)


def test_what_is_handed_to_metaflow_is_what_the_config_file_reads(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("model: {path: m}\ndata: {prompts: a.jsonl, held_out: b.jsonl}\nreward: {function: 'm:f'}\n")
    words = metaflow_arguments(["run", "--config", str(base), "--config-value", "optim.lr=1e-4"], default=base)
    assert load_config(words[2]).optim.lr == 1e-4


def test_an_equals_sign_joins_option_and_value(default, own):
    words = [f"--config={own}", "--config-value=optim.lr=0.5", "run"]
    assert metaflow_arguments(words, default=default) == metaflow_arguments(
        ["--config", str(own), "--config-value", "optim.lr=0.5", "run"], default=default
    )
