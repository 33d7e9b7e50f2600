"""A retraining run without its training: what is new, what it trains on, and what becomes of its model."""

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain import storage
from posttrain.config_file import load_config
from posttrain.config_retrain import RetrainConfig
from posttrain.data import sort_digits
from posttrain.data.sort_digits_days import add_day
from posttrain.errors import ConfigError, DataError
from posttrain.workflow import registry
from runs import ROOT, prepared, recipe_config, result_of, run_step
from steps.promote import promote
from steps.retrain import look, retrained

PROVENANCE = {"flow": "RetrainFlow", "config_sha256": "c"}


def config(folder: Path, **changes: Any) -> RetrainConfig:
    own = {"data.sources": str(folder / "inbox"), "retrain.registry": str(folder / "registry"), "eval.gate": None}
    base = {"base": str(ROOT / "configs" / "retrain_tiny.yaml"), **own, "retrain.replay": 0, "eval.gate": {}}
    return load_config(json.dumps(base | changes), RetrainConfig)


def exported(folder: Path, run: str) -> str:
    uri = str(folder / "runs" / run / "export")
    with storage.staging(uri) as inside:
        (inside / "model.safetensors").write_bytes(run.encode())
        (inside / "lineage.json").write_text(json.dumps([{"run": run}]))
        storage.publish(inside, uri)
    return uri


def evaluation(gain: float, **after: Any) -> dict[str, dict[str, Any]]:
    before = {str(row): -2.0 - row / 100 for row in range(40)}
    better = {row: score + gain for row, score in before.items()}
    return {"before": {"loss": 2.2, "scores": before}, "after": {"loss": 2.2 - gain, "scores": better, **after}}


def finish(folder: Path, run: str, found: dict[str, Any], evaluated: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The step promote of a run whose model is there."""
    made = {"exported_uri": exported(folder, run), "provenance": PROVENANCE | {"run_id": run}}
    return promote(config(folder, **changes), found=found, evaluation=evaluated, **made)


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    """With one day of rows."""
    add_day(tmp_path / "inbox", count=20)
    return tmp_path / "inbox"


def test_the_first_run_trains_the_configs_model_on_all_there_is(tmp_path: Path, inbox: Path):
    found = look(config(tmp_path))
    assert (found["news"], found["parent"]) == ("some", None)
    run = retrained(config(tmp_path), found)
    assert run.model.fresh is not None and run.data.sources[0].path == str(inbox / "day_0001.jsonl")


def test_the_next_run_trains_the_champion_on_what_is_new(tmp_path: Path, inbox: Path):
    done = finish(tmp_path, "1", look(config(tmp_path)), evaluation(0.5))
    assert (done["outcome"], done["version"], done["champion"]) == ("promoted", 1, 1)
    found = look(config(tmp_path))
    assert found["news"] == "none" and found["why"].startswith("nothing new: version 1 of")
    days = [str(add_day(inbox, count=20)) for _ in range(2)]
    found = look(config(tmp_path))
    assert found["news"] == "some" and list(found["files"]) == days
    run = retrained(config(tmp_path), found)
    assert run.model.fresh is None and run.model.path == str(tmp_path / "registry" / "models" / "RetrainFlow" / "1")
    (source,) = run.data.sources
    assert source.path == tuple(days) and source.weight == 1.0
    finish(tmp_path, "2", found, evaluation(0.5))
    assert set(registry.version(str(tmp_path / "registry"), 2)["data"]) == {str(inbox / "day_0001.jsonl"), *days}


def test_rows_that_were_seen_are_replayed_with_their_share_of_the_weight(tmp_path: Path, inbox: Path):
    finish(tmp_path, "1", look(config(tmp_path)), evaluation(0.5))
    day, sources = str(add_day(inbox, count=20)), [{"path": str(inbox), "weight": [[0, 1], [1024, 3]]}]
    own = config(tmp_path, **{"retrain.replay": 0.5, "data.sources": sources})
    new, old = retrained(own, look(own)).data.sources
    assert new.path == day and new.schedule == ((0, 1.0), (1024, 3.0))
    assert old.path == str(inbox / "day_0001.jsonl") and old.schedule == ((0, 0.5), (1024, 1.5))


def test_pairs_are_retrained_from_the_champion_and_compared_by_their_preference(tmp_path: Path):
    (tmp_path / "inbox").mkdir()
    (tmp_path / "inbox" / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sort_digits.pairs(0)))
    dpo = {"method": {"name": "dpo", "packs_per_step": 2}, "data.held_out": "posttrain.data.sort_digits:held_out_pairs"}
    own = config(tmp_path, **dpo, **{"retrain.measure": "preference"})
    found = look(own)
    assert found["news"] == "some" and retrained(own, found).method.name == "dpo"
    done = finish(tmp_path, "1", found, evaluation(0.5), **dpo, **{"retrain.measure": "preference"})
    assert (done["outcome"], done["measure"]) == ("promoted", "preference")
    assert look(own)["why"].startswith("nothing new: version 1 of")


def test_a_function_is_new_once(tmp_path: Path, inbox: Path):
    function = "posttrain.data.sort_digits:exact_demonstrations"
    own = config(tmp_path, **{"data.sources": [str(inbox), function]})
    found = look(own)
    assert [source.path for source in retrained(own, found).data.sources][1] == function
    finish(tmp_path, "1", found, evaluation(0.5), **{"data.sources": [str(inbox), function]})
    assert look(own)["news"] == "none"
    day = str(add_day(inbox, count=20))
    assert [source.path for source in retrained(own, look(own)).data.sources] == [day]


def test_a_model_that_is_not_surely_better_is_kept_out_and_not_trained_again(tmp_path: Path, inbox: Path):
    found = look(config(tmp_path))
    done = finish(tmp_path, "1", found, evaluation(0.005))
    assert (done["outcome"], done["version"], done["champion"]) == ("kept", None, None)
    assert done["why"] == "the gain of +0.005 is above 0.005 with 95% confidence; it must be above 0.01"
    again = look(config(tmp_path))
    assert again["news"] == "none" and "tried by RetrainFlow/1 and not promoted: the gain of" in again["why"]
    assert look(config(tmp_path, **{"optim.lr": 1e-3}))["news"] == "some", "another config is another candidate"
    add_day(inbox, count=20)
    assert len(look(config(tmp_path))["files"]) == 2, "what was not learnt is still new"


def test_a_model_that_the_gate_refuses_is_kept_out_however_large_its_gain(tmp_path: Path, inbox: Path):
    done = finish(tmp_path, "1", look(config(tmp_path)), evaluation(0.5, refused="eval.gate: perplexity went from"))
    assert (done["outcome"], done["why"]) == ("kept", "eval.gate: perplexity went from")
    assert registry.champion(str(tmp_path / "registry")) is None


def test_of_two_runs_from_one_champion_the_later_is_stale_and_a_repeated_one_is_not(tmp_path: Path, inbox: Path):
    one, two = look(config(tmp_path)), look(config(tmp_path))
    assert finish(tmp_path, "1", one, evaluation(0.5))["outcome"] == "promoted"
    late = finish(tmp_path, "2", two, evaluation(0.9))
    assert (late["outcome"], late["champion"]) == ("stale", 1)
    assert late["why"].startswith("there was no champion when this run began, and version 1 is now")
    made = {"exported_uri": str(tmp_path / "runs" / "1" / "export"), "provenance": PROVENANCE | {"run_id": "1"}}
    again = promote(config(tmp_path), found=one, evaluation=evaluation(0.5), **made)
    assert (again["outcome"], again["version"]) == ("promoted", 1)


def test_what_was_rolled_back_does_not_come_back_by_itself(tmp_path: Path, inbox: Path):
    finish(tmp_path, "1", look(config(tmp_path)), evaluation(0.5))
    add_day(inbox, count=20)
    finish(tmp_path, "2", look(config(tmp_path)), evaluation(0.5))
    registry.rollback(str(tmp_path / "registry"), reason="rude")
    found = look(config(tmp_path))
    assert found["news"] == "none" and "promoted as version 2, which was rolled back" in found["why"]
    add_day(inbox, count=20)
    assert len(look(config(tmp_path))["files"]) == 2


def test_too_few_rows_to_compare_by_are_refused_before_the_training(tmp_path: Path, inbox: Path):
    with pytest.raises(DataError, match=r"data\.held_out: small_task:held_out_exact has 8 rows; .* takes 20 at least"):
        look(config(tmp_path, **{"data.held_out": "small_task:held_out_exact"}))


def test_a_source_that_names_nothing_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"data\.sources\[0\]: .*inbox does not exist"):
        look(config(tmp_path))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"warmup.num_steps": 4}, "warmup: it would come before every run, from the champion too; set warmup: null"),
        ({"method": {"name": "reward"}}, "method.name: retrain_flow trains sft and dpo, the config is for reward"),
        (
            {"method": {"name": "dpo"}},
            "retrain.measure = loss: the rows of dpo are compared by preference, or by a reward",
        ),
        (
            {"retrain.measure": "greedy_reward"},
            "retrain.measure = greedy_reward: no answers are asked for; set eval.prompts",
        ),
        ({"retrain.margn": 1}, 'retrain.margn: unknown key; did you mean "margin"?'),
        (
            {"retrain.schedule": "@daily"},
            'retrain: schedule "@daily" is no cron expression: minute hour day month weekday',
        ),
        ({"retrain.after": "A", "retrain.event": "b"}, "retrain: after and event are both set"),
        ({"retrain": None}, "retrain: "),
    ],
)
def test_what_cannot_be_repeated_or_deployed_is_refused(tmp_path: Path, changes: dict[str, Any], line: str):
    base = {"base": str(ROOT / "configs" / "retrain_tiny.yaml"), "method.packs_per_step": 2}
    with pytest.raises(ConfigError) as error:
        load_config(json.dumps(base | changes), RetrainConfig)
    assert any(said.startswith(line) for said in str(error.value).splitlines()), str(error.value)


@pytest.mark.slow
def test_both_models_are_scored_on_the_same_rows_and_the_gate_is_told_and_not_raised(tmp_path: Path):
    asked = {"eval.prompts": "small_task:held_out", "reward.function": "small_task:reward", "eval.samples": 2}
    asked["eval.gate"] = {"loss": 0.0}
    own = recipe_config("sft", **asked)
    base, other = prepared(tmp_path, own), prepared(tmp_path / "other", recipe_config("sft", **asked, seed=7))
    models = {"before": base.model_uri, "after": other.model_uri}
    inputs = {"tokens_uri": base.tokens_uri, "models": models, "per_row": "sampled_reward"}
    found = result_of(run_step("evaluate", own, tmp_path, **inputs))
    for model in found.values():
        assert len(model["scores"]) == model["rows"] == 8
        assert model["sampled_reward"] == pytest.approx(sum(model["scores"].values()) / 8, abs=1e-4)
    assert found["after"]["loss"] > found["before"]["loss"], "of these seeds"
    assert found["after"]["refused"].startswith("eval.gate: loss went from")
