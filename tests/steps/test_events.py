"""configs/events_sft.yaml over a small world: from a table of events to the packs that a model trains on."""

import json

import pytest

from posttrain.config_file import load_config
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.errors import ConfigError, DataError
from posttrain.model.load import load_decoder
from runs import ROOT, prepared
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
