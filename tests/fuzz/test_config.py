"""Any text for a config: a ConfigError that names what is wrong, or a config that survives a trip through JSON."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import fuzzed
from posttrain.config_file import load_config
from posttrain.errors import ConfigError
from posttrain.overrides import metaflow_arguments
from runs import ROOT

CONFIGS = sorted(str(path) for path in (ROOT / "configs").glob("*_tiny.yaml"))
KEYS = [
    *("model.path", "model.fresh", "model.lora", "data.sources", "data.prompts", "data.over_long", "method.name"),
    *("method.loss", "optim.lr", "optim.num_steps", "rollout.timeout_s", "reward.function", "eval.gate", "checkpoint"),
    *("parallel", "tracking", "seed", "method.group_size", "warmup", "eval.every_steps", "data.pack_tokens", "model"),
]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["a.b:c"])
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def parsed_or_refused(text: str) -> None:
    try:
        config = load_config(text)
    except ConfigError as error:
        assert str(error).strip()
        return
    assert load_config(config.model_dump_json()) == config


@fuzzed
@given(st.text(max_size=60) | st.text(alphabet="{}[]:,-&*!|>'\"#%@ \n\tab1", max_size=40))
def test_any_text(text: str):
    parsed_or_refused(text)


@fuzzed
@given(st.sampled_from(CONFIGS), st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=12), values, max_size=3))
@pytest.mark.fault("F26", "F27", outcome="REFUSE")
def test_any_value_of_any_key_over_a_sound_config(base: str, changes: dict[str, Any]):
    parsed_or_refused(json.dumps({**changes, "base": base}, allow_nan=True))


@fuzzed
@given(
    st.lists(st.sampled_from(["run", "--config", "--config-value", "=", "config"]) | st.text(max_size=12), max_size=6)
)
def test_any_words_of_a_command_line(words: list[str]):
    from pathlib import Path

    try:
        made = metaflow_arguments(words, default=Path(CONFIGS[0]))
    except ConfigError as error:
        assert str(error).strip()
        return
    assert all(isinstance(word, str) for word in made)


@pytest.mark.parametrize(
    "text",
    [
        "&a [*a]",
        "{optim: &a {lr: *a}}",
        "a: " + "[" * 2000,
        "{base: /dev/null}",
        '{base: "\\0"}',
        "{base: ~nobody-of-this-name/x}",
        "x: 1e999999999",
    ],
)
@pytest.mark.fault("F26", outcome="REFUSE")
def test_what_has_no_end_or_is_no_file_is_refused(text: str):
    with pytest.raises(ConfigError):
        load_config(text)
