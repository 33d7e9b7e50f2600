"""Constrained sampling by the embedded generator: only what is allowed, at the trainer's probability."""

from pathlib import Path

import pytest
import torch

from posttrain import storage
from posttrain.compute.generator import Request
from posttrain.compute.generator.transformers import TransformersGenerator
from posttrain.data.batch import collate
from posttrain.data.constraint import load_constraint
from posttrain.data.pack import pack
from posttrain.data.rollout import group_units
from posttrain.data.types import Prompt, Rollout
from posttrain.errors import GenerationError
from posttrain.model.forward import forward
from posttrain.model.load import load_decoder
from posttrain.model.weights import hf_tensors
from small_constraints import PATHS, STOP
from tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    uri = tmp_path_factory.mktemp("model") / "tiny"
    storage.ensure_folder(str(uri), lambda target: (tiny_model(target), None)[1])
    return uri


def generator(folder: Path, constraint: str) -> TransformersGenerator:
    made = TransformersGenerator(model_uri=str(folder), stop_ids=(STOP,), pad_id=0, constraint=constraint)
    made.sync(0, dict(hf_tensors(load_decoder(folder))))
    return made


def asked(*ids: int, seed: int, temperature: float = 1.0, new: int = 12) -> Request:
    return Request(token_ids=ids, seed=seed, temperature=temperature, max_new_tokens=new)


def test_every_completion_is_a_slate_of_distinct_items(folder: Path):
    engine = generator(folder, "small_constraints:slates")
    made = engine.generate([asked(4, 5, seed=s, temperature=float(s > 0)) for s in range(40)])
    slates = {tuple(tuple(c.token_ids[i : i + 3]) for i in (0, 3, 6)) for c in made}
    assert len(slates) > 10
    assert all(len(set(slate)) == 3 and set(slate) <= set(PATHS) for slate in slates)
    assert all(c.token_ids[9:] == (STOP,) and c.finish_reason == "stop" and c.logprobs[-1] == 0.0 for c in made)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("constraint", ["small_constraints:slates", "small_constraints:after_one_free_token"])
def test_sampler_logprobs_are_the_trainers_of_the_renormalised_policy(folder: Path, constraint: str, temperature):
    requests = [asked(*range(10, 10 + n), seed=n, temperature=temperature) for n in range(1, 9)]
    made = generator(folder, constraint).generate(requests)
    rule, model = load_constraint(constraint, folder), load_decoder(folder)
    for request, completion in zip(requests, made, strict=True):
        rollout = Rollout(
            prompt=Prompt(uid=0, token_ids=request.token_ids, row={}),
            sample_index=0,
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            versions=completion.versions,
            finish_reason=completion.finish_reason,
        )
        (packed,) = pack(group_units([rollout], [1.0], constraint=rule), pack_tokens=64)
        batch = collate(packed, pack_tokens=64)
        with torch.no_grad():
            ours = forward(model, batch, temperature=temperature).logprobs
        torch.testing.assert_close(ours, batch.sampler_logprobs, atol=1e-5, rtol=1e-4)


def test_a_constraint_that_allows_nothing_is_told_and_not_sampled_around(folder: Path):
    with pytest.raises(GenerationError, match="allows no token after the completion"):
        generator(folder, "small_constraints:nothing").generate([asked(4, seed=0)])
