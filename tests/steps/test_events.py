"""configs/events_sft.yaml over a small world: from a table of events to the packs that a model trains on."""

import json

import pytest

from posttrain.config_file import load_config
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.errors import ConfigError, DataError
from posttrain.model.load import load_decoder
from runs import ROOT, metrics, prepared, result_of, run_step
from small_events import SCHEMA
from steps.plan import plan
from steps.streams import held_out_units, open_stream


def events_config(**overrides):
    small = {
        "base": str(ROOT / "configs" / "events_sft.yaml"),
        "model.fresh.tokenizer": "small_events:tokenizer",
        "data.sources": "small_events:training",
        "data.held_out": "small_events:held_out",
    }
    return load_config(json.dumps(small | overrides))


def test_a_fresh_model_has_the_vocabulary_of_the_schema_and_trains_on_what_was_played(tmp_path):
    config = events_config()
    run = prepared(tmp_path, config)
    tokenizer = BaseHFModelTokenizer(run.model_uri)
    words = tokenizer.hf.convert_ids_to_tokens(range(3, len(tokenizer.hf)))
    assert tuple(words) == SCHEMA.vocabulary
    assert load_decoder(run.model_uri).config.vocab_size == len(SCHEMA.vocabulary) + 3
    units = held_out_units(run.tokens_uri)
    packs = open_stream(config, tokens_uri=run.tokens_uri, model_uri=run.model_uri, stage="sft").window(0).packs
    samples = [sample for pack in packs for sample in pack.samples] + [sample for (sample,) in units]
    trained = {int(token) for sample in samples for token in sample.target_ids[sample.loss_mask > 0]}
    assert set(tokenizer.hf.convert_ids_to_tokens(sorted(trained))) <= {*SCHEMA.items.vocabulary, "<|end|>"}
    assert len(units) > 10 and len(trained) > 20


def test_a_tokenizer_that_is_not_there_is_refused_before_anything_is_made(tmp_path):
    config = events_config(**{"model.fresh.tokenizer": "small_events:tokeniser", "checkpoint.root": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"model\.fresh\.tokenizer: small_events:tokeniser: small_events has no"):
        plan(config, flow="SFTFlow", run_id="1")


def test_a_function_that_writes_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no tokenizer"):
        prepared(tmp_path, events_config(**{"model.fresh.tokenizer": "small_events:no_tokenizer"}))


TASKS = {
    "base": str(ROOT / "configs" / "events_tasks.yaml"),
    "data.sources": "small_events:training_tasks",
    "data.held_out": "small_events:held_out_tasks",
}


@pytest.mark.slow
def test_one_model_learns_the_next_item_whether_it_is_played_and_for_how_long(tmp_path):
    small = {"optim.num_steps": 24, "optim.warmup_steps": 2, "eval.every_steps": 12, "parallel.data": 2}
    config = events_config(**TASKS, **small, **{"method.packs_per_step": 2, "checkpoint.every_steps": 12})
    run = prepared(tmp_path, config)
    samples = [sample for (sample,) in held_out_units(run.tokens_uri)]
    assert all(sample.features.shape == (len(sample), 2) for sample in samples)
    assert {float(v) for sample in samples for v in sample.labels[:, 0] if v == v} == {0.0, 1.0}
    inputs = {"root": str(tmp_path), "model_uri": run.model_uri, "tokens_uri": run.tokens_uri, "recipe": True}
    found = result_of(run_step("train", config, tmp_path, **inputs))
    steps = metrics(tmp_path / "metrics" / "sft.jsonl")
    assert steps[-1]["loss"] < steps[0]["loss"]
    first, last = (
        {name: row[f"eval/{name}/loss"] / row[f"eval/{name}/labelled"] for name in ("click", "watch_hours")}
        for row in steps
        if "eval/loss" in row
    )
    assert last["click"] < 0.69 and last["watch_hours"] < 0.5, (first, last)
    model = load_decoder(found["model_uri"])
    assert model.config.heads == {"side": "posttrain.model.side:EventNumbers", "click": 1, "watch_hours": 1}
    drawn = load_decoder(run.model_uri, heads=model.config.heads, seed=config.seed)
    assert all((model.heads[name].weight - drawn.heads[name].weight).abs().max() > 1e-4 for name in model.heads)


def test_a_module_at_the_front_that_names_no_features_is_refused(tmp_path):
    changes = {**TASKS, "method.side": "torch.nn:Identity", "checkpoint.root": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"method\.side: torch\.nn:Identity has features = \(\); give it the names"):
        plan(events_config(**changes), flow="SFTFlow", run_id="1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method.heads": {"value": {"kind": "bce"}}}, "value means another head"),
        ({"parallel.context": 2, "parallel.gpus": 2}, "method.heads read"),
        ({"model.backend": "transformers"}, "need posttrain's own decoder"),
    ],
)
def test_heads_that_cannot_be_trained_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        events_config(**TASKS, **changes)
