"""Constrained sampling by vLLM: only what is allowed, at the trainer's logprobs, through a sync between two tokens."""

import threading
from pathlib import Path

import pytest
import torch

from posttrain.compute.generator import Completion, Request
from posttrain.compute.generator.vllm import VllmGenerator, vllm_is_installed
from posttrain.data.batch import collate
from posttrain.data.constraint import load_constraint
from posttrain.data.pack import pack
from posttrain.data.rollout import group_units
from posttrain.data.types import Prompt, Rollout
from posttrain.model.forward import forward
from posttrain.model.load import load_decoder
from posttrain.model.weights import hf_tensors
from small_constraints import PATHS, STOP
from vllm_models import asked, model_folder, told_of_step

pytestmark = pytest.mark.skipif(not vllm_is_installed(), reason="vllm is not installed: make test-vllm")
RULE = "small_constraints:slates"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def engine(folder: Path) -> VllmGenerator:
    made = VllmGenerator(model_uri=str(folder), stop_ids=(STOP,), pad_id=0, constraint=RULE)
    made.sync(0, dict(hf_tensors(load_decoder(folder))))
    return made


def gap(model, folder: Path, request: Request, completion: Completion) -> float:
    """Largest difference of the sampler's logprobs from the trainer's, nats."""
    named = {name: getattr(completion, name) for name in ("token_ids", "logprobs", "versions", "finish_reason")}
    rollout = Rollout(prompt=Prompt(uid=0, token_ids=request.token_ids, row={}), sample_index=0, **named)
    units = group_units([rollout], [1.0], constraint=load_constraint(RULE, folder))
    batch = collate(pack(units, pack_tokens=64)[0], pack_tokens=64)
    with torch.no_grad():
        found = forward(model, batch, temperature=request.temperature).logprobs
    return float((found - batch.sampler_logprobs).abs().max())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_logprobs_are_the_trainers_and_slates_hold_distinct_items(engine, folder: Path, temperature: float):
    requests = [asked(*range(10, 10 + n % 7 + 1), seed=n, temperature=temperature) for n in range(70)]
    made, model = engine.generate(requests), load_decoder(folder)
    slates = {tuple(tuple(c.token_ids[i : i + 3]) for i in (0, 3, 6)) for c in made}
    assert len(slates) > 10 and all(len(set(slate)) == 3 and set(slate) <= set(PATHS) for slate in slates)
    assert all(c.token_ids[9:] == (STOP,) and c.finish_reason == "stop" for c in made)
    assert max(gap(model, folder, r, c) for r, c in zip(requests, made, strict=True)) < 1e-5


def test_requests_that_run_through_a_sync_go_on_with_their_path(engine, folder: Path):
    """All are stopped, dropped from the batch, and put back with the tokens that they had."""
    requests = [asked(*range(11, 11 + n % 5), 5, seed=n) for n in range(300)]
    made: list[Completion] = []
    waiting = threading.Thread(target=lambda: made.extend(engine.generate(requests)))
    with told_of_step(engine, 4) as started:
        waiting.start()
        assert started.wait(60)
        engine.sync(1, dict(hf_tensors(load_decoder(folder))))
        waiting.join(120)
    assert any(0 < c.versions.count(0) < 10 for c in made), "no request ran through the sync"
    model = load_decoder(folder)
    assert max(gap(model, folder, r, c) for r, c in zip(requests, made, strict=True)) < 1e-5
