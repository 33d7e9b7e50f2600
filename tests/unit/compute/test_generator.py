"""The embedded generator: its logprobs are ours, its noise belongs to the request, and a sync is proved."""

from pathlib import Path

import pytest
import torch

from posttrain import storage
from posttrain.compute.generator import Completion, Request
from posttrain.compute.generator.transformers import TransformersGenerator, sample
from posttrain.compute.weight_sync import digest
from posttrain.data.batch import collate
from posttrain.data.sample import shift
from posttrain.data.types import Pack
from posttrain.model.forward import forward
from posttrain.model.load import load_decoder
from posttrain.model.weights import hf_tensors
from tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    uri = tmp_path_factory.mktemp("model") / "tiny"
    storage.ensure_folder(str(uri), lambda target: (tiny_model(target), None)[1])
    return uri


def generator(folder: Path, **options) -> TransformersGenerator:
    made = TransformersGenerator(**{"model_uri": str(folder), "stop_ids": (2,), "pad_id": 0} | options)
    made.sync(3, dict(hf_tensors(load_decoder(folder))))
    return made


def request(*ids: int, seed: int = 0, temperature: float = 1.0, new: int = 12) -> Request:
    return Request(token_ids=ids, seed=seed, temperature=temperature, max_new_tokens=new)


def our_logprobs(folder: Path, asked: Request, made: Completion) -> torch.Tensor:
    prompt = len(asked.token_ids)
    ids = [*asked.token_ids, *made.token_ids]
    one = shift(ids, [0.0] * prompt + [1.0] * len(made.token_ids))
    batch = collate(Pack(samples=(one,), num_units=1), pack_tokens=len(ids))
    return forward(load_decoder(folder), batch, temperature=asked.temperature or 1.0).logprobs.detach()


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_sampler_logprobs_are_the_trainers(folder: Path, temperature: float):
    asked = [
        request(5, 6, 7, seed=1, temperature=temperature),
        request(*range(10, 30), seed=2, temperature=temperature),
    ]
    for one, made in zip(asked, generator(folder).generate(asked), strict=True):
        torch.testing.assert_close(torch.tensor(made.logprobs), our_logprobs(folder, one, made), atol=1e-5, rtol=1e-4)
        assert made.versions == (3,) * len(made.token_ids)


def test_a_completion_depends_on_its_request_and_not_on_its_neighbours(folder: Path):
    asked = [request(*range(3, 3 + n), seed=n) for n in (1, 5, 9, 2)]
    together = generator(folder).generate(asked)
    alone = [generator(folder).generate([one])[0] for one in asked]
    chunks = generator(folder, max_batch=2).generate(asked)
    assert [c.token_ids for c in together] == [c.token_ids for c in alone] == [c.token_ids for c in chunks]


def test_seed_decides_and_greedy_ignores_it(folder: Path):
    engine = generator(folder)
    first, again, other = engine.generate([request(4, 5, seed=s) for s in (1, 1, 2)])
    assert first.token_ids == again.token_ids and first.token_ids != other.token_ids
    greedy = engine.generate([request(4, 5, seed=s, temperature=0.0) for s in (1, 2)])
    assert greedy[0].token_ids == greedy[1].token_ids


def test_stop_token_ends_and_is_kept_and_length_is_said(folder: Path):
    engine = generator(folder)
    made = engine.generate([request(4, 5, seed=s, new=40) for s in range(64)])
    stopped = [c for c in made if c.finish_reason == "stop"]
    cut = [c for c in made if c.finish_reason == "length"]
    assert stopped and cut, "64 samples of up to 40 tokens hold both kinds"
    assert all(c.token_ids[-1] == 2 and 2 not in c.token_ids[:-1] for c in stopped)
    assert all(len(c.token_ids) == 40 and 2 not in c.token_ids for c in cut)
    assert all(len(c.token_ids) == len(c.logprobs) == len(c.versions) for c in made)


def test_any_of_several_stop_tokens_ends_a_completion(folder: Path):
    stops = tuple(range(2, 60))
    made = generator(folder, stop_ids=stops).generate([request(5, seed=n, new=40) for n in range(32)])
    ended = [c for c in made if c.finish_reason == "stop"]
    assert len({c.token_ids[-1] for c in ended}) > 1
    for completion in ended:
        assert completion.token_ids[-1] in stops and not set(completion.token_ids[:-1]) & set(stops)


def test_requests_of_one_batch_keep_their_own_limits(folder: Path):
    made = generator(folder).generate([request(4, seed=s, new=n) for s, n in enumerate((1, 7, 3))])
    assert all(len(c.token_ids) <= n for c, n in zip(made, (1, 7, 3), strict=True))


def test_inverse_cdf_draws_the_distribution():
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.7]])).expand(3000, 3)
    noise = torch.arange(3000, dtype=torch.float64) / 3000
    tokens, logprobs = sample(logits, noise, torch.ones(3000))
    assert torch.bincount(tokens, minlength=3).tolist() == pytest.approx([300, 600, 2100], abs=1)
    assert logprobs[0].exp().item() == pytest.approx(0.1, rel=1e-5)


def test_sync_answers_with_what_is_held(folder: Path):
    engine = generator(folder)
    weights = {name: tensor + 0.25 for name, tensor in hf_tensors(load_decoder(folder))}
    assert engine.sync(4, weights) == digest(weights.items())
    one = next(iter(weights))
    assert digest(weights.items()) != digest((weights | {one: weights[one] + 1e-7}).items())


def test_generating_before_a_sync_is_our_own_mistake(folder: Path):
    fresh = TransformersGenerator(model_uri=str(folder), stop_ids=(2,), pad_id=0)
    with pytest.raises(AssertionError, match="holds no weights"):
        fresh.generate([request(1)])
