"""A policy rank trains any family of the decoder, and says how its experts were used."""

import numpy as np
import torch

from posttrain import storage
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.model.losses.sft import SFTLoss
from posttrain.workflow.policy import PolicyRank, Training
from tiny_families import random_config, random_model


def rank_of(tmp_path, family: str) -> PolicyRank:
    random_model(random_config(family, 1) | {"vocab_size": 97}, tmp_path / "made", std=0.05)
    storage.publish(tmp_path / "made", str(tmp_path / "model"))
    training = Training(
        num_steps=5,
        lr=1e-2,
        schedule="constant",
        warmup_steps=0,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        max_grad_norm=1.0,
        pack_tokens=64,
    )
    uri = str(tmp_path / "model")
    rank = PolicyRank(rank=0, world_size=1, model_uri=uri, backend="posttrain", training=training, reference=False)
    rank.address()
    token, square = rank.join("", 60.0)
    assert token > 0 and square > 0
    return rank


def steps_of(rank: PolicyRank) -> list[dict[str, float]]:
    ids = np.random.default_rng(0).integers(1, 97, (4, 30))
    packs = pack([(shift(row.tolist(), [1.0] * 30),) for row in ids], pack_tokens=64)
    total = sum(each.loss_tokens for each in packs)
    return [rank.train_step(step, packs, SFTLoss(), total) for step in range(5)]


def test_experts_are_trained_and_their_load_is_a_metric(tmp_path):
    rank = rank_of(tmp_path, "gpt_oss")
    before = rank.engine.model.layers[0].mlp.experts.gate_up_proj.detach().clone()
    found = steps_of(rank)
    assert found[-1]["loss"] < found[0]["loss"]
    assert not torch.equal(before, rank.engine.model.layers[0].mlp.experts.gate_up_proj)
    assert found[-1]["router/max_load"] >= 1 and 0 <= found[-1]["router/entropy"] <= 1


def test_a_dense_model_has_no_router_metrics(tmp_path):
    found = steps_of(rank_of(tmp_path, "gemma3_text"))
    assert found[-1]["loss"] < found[0]["loss"]
    assert not [name for name in found[-1] if name.startswith("router/")]
