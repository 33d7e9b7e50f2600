"""What a rank says of the tokens of packs before a step, against models that are asked one by one."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

import tiny_training
from posttrain import storage
from posttrain.compute.mesh import Sizes
from posttrain.data.batch import collate
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.data.types import Pack, Sample
from posttrain.errors import ComputeError
from posttrain.model.forward import forward
from posttrain.model.load import load_decoder
from posttrain.model.lora import LoRA
from posttrain.model.losses.policy_gradient import TruncatedLoss
from posttrain.model.losses.value import ValueLoss
from posttrain.workflow.policy_model import Build
from posttrain.workflow.policy_rank import PolicyRank
from tiny_families import random_config, random_model

TRAINING = replace(tiny_training.TRAINING, pack_tokens=32)
ALL = ("values", "ref_logprobs", "teacher")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for name, family in (("student", "qwen3"), ("teacher", "llama")):
        random_model(random_config(family, 1) | {"vocab_size": 97}, folder / f"{name}_made", std=0.2)
        storage.publish(folder / f"{name}_made", str(folder / name))
    return {name: str(folder / name) for name in ("student", "teacher")}


def rank_of(models: dict[str, str], *, lora: LoRA | None = None) -> PolicyRank:
    build = Build(lora=lora, value_head=True, teacher_uri=models["teacher"])
    facts = {"backend": "posttrain", "training": TRAINING, "build": build}
    rank = PolicyRank(rank=0, sizes=Sizes(data=1), model_uri=models["student"], reference=True, **facts)
    rank.address()
    rank.join("", 60.0)
    return rank


def rollouts() -> list[Pack]:
    rng, units = np.random.default_rng(0), []
    for n in (5, 9, 7, 3):
        silent = [0.0] * 6
        columns = {name: silent + rng.normal(size=n).tolist() for name in ("sampler_logprobs", "advantages")}
        columns |= {name: silent + rng.normal(size=n).tolist() for name in ("values", "returns")}
        units.append((shift(rng.integers(1, 97, 6 + n).tolist(), silent + [1.0] * n, **columns),))
    return pack(units, pack_tokens=32)


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_reference_and_teacher_are_asked_at_the_temperature_and_do_not_move_with_the_policy(models, lora):
    rank, packs = rank_of(models, lora=lora), rollouts()
    loss = ValueLoss(policy=TruncatedLoss(temperature=0.7))
    tokens = sum(each.loss_tokens for each in packs)
    before = rank.token_scores(packs, ALL, 0.7)
    metrics = [rank.train_step(step, packs, loss, tokens) for step in range(3)]
    after = rank.token_scores(packs, ALL, 0.7)
    for name, uri in (("ref_logprobs", models["student"]), ("teacher", models["teacher"])):
        model = load_decoder(uri)
        for each, one, other in zip(packs, before, after, strict=True):
            with torch.no_grad():
                expected = forward(model, collate(each, pack_tokens=32), temperature=0.7).logprobs.numpy()
            np.testing.assert_allclose(one[name], expected, atol=1e-5)
            np.testing.assert_allclose(other[name], expected, atol=1e-5)
    assert all((each["values"] == 0).all() for each in before) and all((each["values"] != 0).any() for each in after)
    assert metrics[-1]["value/loss"] < metrics[0]["value/loss"], "the critic learns"


def test_a_reference_that_was_asked_before_the_step_is_not_asked_again(models):
    rank, packs = rank_of(models), rollouts()
    (sample, *_) = packs[0].samples
    marked = [Pack(samples=(with_reference(sample),), num_units=1)]
    loss = ValueLoss(policy=TruncatedLoss(temperature=1.0))
    found = rank.train_step(0, marked, loss, marked[0].loss_tokens)
    assert found["kl"] > 50, "the reference that the batch brought, 100 nats away"


def with_reference(sample: Sample) -> Sample:
    return replace(sample, ref_logprobs=np.full(len(sample), 5.0, np.float32))


def test_a_critic_is_kept_in_checkpoints_and_sent_to_no_generator(models):
    rank = rank_of(models)
    assert any("heads.value" in name for name in rank.state_shapes())
    assert not any("value" in name for name in rank.weights("float32")), "no generator has a place for it"


@dataclass(frozen=True)
class TooLarge:
    """A loss that finds the device full, as CUDA's allocator says it."""

    temperature: float = 1.0
    reads: ClassVar[str] = "tokens"

    def __call__(self, output, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.fault("F10", outcome="STOP")
def test_a_full_gpu_is_named_with_the_packs_the_plan_and_the_fix(models):
    rank, packs = rank_of(models), rollouts()
    with pytest.raises(ComputeError) as caught:
        rank.train_step(6, packs, TooLarge(), 24.0)
    said = str(caught.value)
    documents = sorted((len(sample) for pack in packs for sample in pack.samples), reverse=True)
    assert said.startswith(
        f"step 7: out of GPU memory with {len(packs)} packs of 32 tokens, 4 documents, the longest of"
    )
    assert ", ".join(map(str, documents)) in said
    assert "planned: 0." in said and "activation_checkpointing" in said and "Tried to allocate 20.00 GiB" in said
