"""vLLM opens a folder whose vocabulary grew by the names of items, and gives our logprobs of them."""

from pathlib import Path

import pytest

from posttrain import storage
from posttrain.compute.generator.vllm import VllmGenerator, vllm_is_installed
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.model.load import load_decoder
from posttrain.model.weights import hf_tensors
from text_and_items import checkpoint, grown, held_out, ids
from vllm_models import asked, our_logprobs

pytestmark = pytest.mark.skipif(not vllm_is_installed(), reason="vllm is not installed: make test-vllm")


def test_a_model_of_text_and_items_is_sampled_from_after_events_at_our_logprobs(tmp_path: Path):
    text, folder = checkpoint(tmp_path / "text"), tmp_path / "grown"
    storage.ensure_folder(str(folder), lambda target: (grown(text, target), None)[1])
    tokenizer, model = BaseHFModelTokenizer(folder), load_decoder(folder)
    engine = VllmGenerator(model_uri=str(folder), stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id)
    engine.sync(0, dict(hf_tensors(model)))
    names = set(tokenizer.hf.convert_tokens_to_ids(list(ids().vocabulary)))
    prompts = [tokenizer.prompt(row["messages"][:7]) for row in held_out(0)[:4]]
    assert all(names & set(prompt) for prompt in prompts)
    requests = [asked(*prompt, seed=n) for n in range(4) for prompt in prompts]
    made = engine.generate(requests)
    assert any(set(each.token_ids) & names for each in made)
    for request, each in zip(requests, made, strict=True):
        ours = our_logprobs(model, request, each)
        assert max(abs(a - b) for a, b in zip(ours.tolist(), each.logprobs, strict=True)) < 1e-5
