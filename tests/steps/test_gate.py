"""A gate names what the run measures, of all held-out rows or of a slice; else it is refused before training."""

import json
from pathlib import Path

import pytest

from posttrain.errors import ConfigError
from runs import prepared, recipe_config, small_config
from steps.plan import plan
from steps.prepare import prepare


def test_a_gate_on_what_is_not_measured_is_refused(tmp_path: Path):
    config = recipe_config("sft", **{"checkpoint.root": str(tmp_path), "eval.gate": {"loss": 0.1, "accuracy": 0}})
    with pytest.raises(ConfigError, match=r"eval.gate.accuracy: no measure of this run; it has loss, perplexity$"):
        plan(config, flow="SFTFlow", run_id="1")


@pytest.mark.parametrize(
    ("slice_by", "name", "says"),
    [
        (
            "slice",
            "accuracy[slice=long]",
            "it has loss, perplexity, and of a slice loss[slice=...], perplexity[slice=...]",
        ),
        ("slice", "loss[lang=de]", "it has loss, perplexity, and of a slice loss[slice=...], perplexity[slice=...]"),
        (None, "loss[slice=long]", "it has loss, perplexity; a slice needs eval.slice_by"),
    ],
)
def test_a_gate_on_a_slice_that_is_not_measured_is_refused_at_the_start(tmp_path: Path, slice_by, name, says):
    gate = {"checkpoint.root": str(tmp_path), "eval.slice_by": slice_by, "eval.gate": {name: 0, "loss": 0}}
    with pytest.raises(ConfigError) as error:
        plan(recipe_config("sft", **gate), flow="SFTFlow", run_id="1")
    assert str(error.value) == f"eval.gate.{name}: no measure of this run; {says}"


def test_a_gate_on_a_slice_without_rows_is_refused_before_anything_is_tokenised(tmp_path: Path):
    sliced = {"data.held_out": "small_task:sliced_sft", "eval.slice_by": "slice", "checkpoint.root": str(tmp_path)}
    plan(recipe_config("sft", **sliced, **{"eval.gate": {"loss[slice=long]": 0}}), flow="SFTFlow", run_id="1")
    config = recipe_config("sft", **sliced, **{"eval.gate": {"loss[slice=middle]": 0}})
    plan(config, flow="SFTFlow", run_id="2")
    with pytest.raises(ConfigError, match=r"eval.gate.loss\[slice=middle\]: .*slice = middle; there are long, short$"):
        prepare(config, root=str(tmp_path / "SFTFlow" / "2"))


def test_a_gate_on_a_slice_whose_rows_are_all_too_long_is_refused_before_training(tmp_path: Path):
    rows = {"de": " ".join(str(7**n) for n in range(60)), "en": "12"}
    turns = {lang: [{"role": "user", "content": "?"}, {"role": "assistant", "content": s}] for lang, s in rows.items()}
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"messages": found, "lang": lang}) + "\n" for lang, found in turns.items()))
    sliced = {"data.held_out": str(path), "eval.slice_by": "lang", "data.over_long": "drop"}
    prepared(tmp_path / "en", recipe_config("sft", **sliced, **{"eval.gate": {"loss[lang=en]": 0}}))
    with pytest.raises(ConfigError, match=r"eval.gate.loss\[lang=de\]: .* has lang = de; there are en$"):
        prepared(tmp_path / "de", recipe_config("sft", **sliced, **{"eval.gate": {"loss[lang=de]": 0}}))


def test_rl_is_gated_on_the_rewards_of_a_slice(tmp_path: Path):
    gate = {"sampled_reward[slice=a]": 0.1, "pass@4[slice=a]": 0, "greedy_reward": 0}
    changes = {"checkpoint.root": str(tmp_path), "eval.slice_by": "slice", "eval.gate": gate}
    plan(small_config(**changes), flow="GRPOFlow", run_id="1")
    with pytest.raises(ConfigError, match=r"eval.gate.loss\[slice=a\]: no measure of this run; it has greedy_reward"):
        plan(small_config(**changes | {"eval.gate": {"loss[slice=a]": 0}}), flow="GRPOFlow", run_id="2")
