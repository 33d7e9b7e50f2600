"""Text and semantic IDs in one model: the ordinary SFT recipe on both, and a folder that others open."""

from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain import storage
from posttrain.data.semantic_ids import SemanticIds
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.model.load import load_decoder, read_config
from posttrain.model.rank_items import path_scores
from posttrain.model.verify import compare_with_transformers
from runs import metrics, prepared, recipe_config, result_of, run_step
from small_events import WORLD
from text_and_items import checkpoint, grown, held_out, ids

CHANGES = {
    "data.sources": [{"path": "small_task:exact"}, {"path": "text_and_items:events", "weight": 2}],
    "data.held_out": "text_and_items:held_out",
    "data.pack_tokens": 512,
    "data.over_long": "split",
    "optim.num_steps": 8,
    "optim.lr": 5e-3,
    "parallel.data": 1,
}


@pytest.mark.slow
def test_a_text_checkpoint_learns_text_and_items_together_and_opens_in_transformers(tmp_path: Path):
    start = grown(checkpoint(tmp_path / "text"), tmp_path / "grown")
    config = recipe_config("sft", **CHANGES, **{"model": {"fresh": None, "path": str(start)}})
    run = prepared(tmp_path / "run", config)
    inputs = {"root": str(tmp_path / "run"), "model_uri": run.model_uri, "tokens_uri": run.tokens_uri, "recipe": True}
    found = result_of(run_step("train", config, tmp_path / "run", **inputs))
    losses = [row["loss"] for row in metrics(tmp_path / "run" / "metrics" / "sft.jsonl")]
    assert losses[-1] < 0.8 * losses[0]

    folder = storage.fetch(found["model_uri"])
    tokenizer, model = BaseHFModelTokenizer(folder), load_decoder(folder)
    assert read_config(folder)["architectures"] == ["Qwen3ForCausalLM"]
    assert model.config.vocab_size == tokenizer.max_id + 1 == read_config(folder)["vocab_size"]
    np.testing.assert_array_equal(SemanticIds.load(folder).codes, ids().codes)
    before, after = load_decoder(start).embedding.weight, model.embedding.weight
    learned = [tokenizer.hf.convert_tokens_to_ids(token) for token in ("<sid_0_0>", "1")]
    assert all((after[i] - before[i]).abs().max() > 1e-4 for i in learned), "tokens of items and of text"

    assert compare_with_transformers(folder)["max_abs_diff"] <= 1e-4
    rows = held_out(0)[:2]
    scores = path_scores(model, tokenizer, rows, ids(), ids().items.tolist(), pack_tokens=512, beam=len(ids().items))
    torch.testing.assert_close(np.exp(scores.astype(np.float64)).sum(1), np.ones(len(scores)), atol=1e-4, rtol=0)
    assert scores.shape[1] == int((~WORLD.cold).sum())
