"""A policy rank trains any family of the decoder, and says how its experts were used."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from posttrain import storage
from posttrain.compute.cluster import Gang, ray_cluster
from posttrain.compute.mesh import Sizes
from posttrain.compute.pool import Pool
from posttrain.compute.weight_sync import digest
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.data.types import Pack
from posttrain.model.losses.sft import SFTLoss
from posttrain.workflow.costs import Costs
from posttrain.workflow.policy import Policy
from posttrain.workflow.policy_rank import PolicyRank
from tiny_families import random_config, random_model
from tiny_training import TRAINING


def made(tmp_path, family: str) -> str:
    if not (tmp_path / "model").exists():
        random_model(random_config(family, 1) | {"vocab_size": 97}, tmp_path / "made", std=0.05)
        storage.publish(tmp_path / "made", str(tmp_path / "model"))
    return str(tmp_path / "model")


def rank_of(tmp_path, family: str) -> PolicyRank:
    uri = made(tmp_path, family)
    rank = PolicyRank(
        rank=0, sizes=Sizes(data=1), model_uri=uri, backend="posttrain", training=TRAINING, reference=False
    )
    rank.address()
    rank.costs = rank.join("", 60.0)
    return rank


def packs_of(lengths: list[int], trained: int = 1000) -> list[Pack]:
    """Packs of 64 tokens; of every document at most the last `trained` tokens carry loss."""
    rng = np.random.default_rng(0)
    units = []
    for n in lengths:
        mask = [0.0] * (n + 1 - min(n, trained)) + [1.0] * min(n, trained)
        units.append((shift(rng.integers(1, 97, n + 1).tolist(), mask),))
    return pack(units, pack_tokens=64)


def steps_of(rank: PolicyRank) -> list[dict[str, float]]:
    packs = packs_of([29] * 4)
    total = sum(each.loss_tokens for each in packs)
    return [rank.train_step(step, packs, SFTLoss(), total) for step in range(5)]


def test_a_policy_on_a_mesh_takes_the_steps_of_one_rank_and_publishes_the_same_model(tmp_path):
    """First in this file, as the others import ray before a cluster is up. Three packs for two data ranks: one repeats
    a pack that counts nothing. The reference is sharded too."""
    uri = made(tmp_path, "qwen2")
    packs, loss = packs_of([60, 50, 40], trained=20), SFTLoss()

    async def together():
        policy = await Policy.launch(
            sizes=Sizes(data=2, tensor=2),
            model_uri=uri,
            backend="posttrain",
            training=TRAINING,
            reference=True,
            timeout_s=60,
            pool=Pool(),
        )
        import ray

        history = [await policy.train_step(step, packs, loss) for step in range(2)]
        sent = ray.get(policy.start_weights("float32"))
        assert await policy.weights_digest("float32") == digest(sent.items())
        return policy.costs, history, sent, await policy.export(str(tmp_path / "exported"))

    with ray_cluster(Gang(), num_cpus=5, num_gpus=0):
        costs, history, sent, exported = asyncio.run(together())
    alone = rank_of(tmp_path, "qwen2")
    assert costs == replace(alone.costs, sharded=True), "costs are of the whole model"
    total = sum(each.loss_tokens for each in packs)
    expected = [alone.train_step(step, packs, loss, total) for step in range(2)]
    for found, theirs in zip(history, expected, strict=True):
        assert {name: found[name] for name in ("loss", "entropy", "grad_norm")} == pytest.approx(
            {name: theirs[name] for name in ("loss", "entropy", "grad_norm")}, rel=1e-5
        )
    published = load_file(storage.fetch(exported) / "model.safetensors")
    for name, weight in alone.weights("float32").items():
        torch.testing.assert_close(sent[name], weight, rtol=0, atol=2e-4)  # lr is 1e-2; see test_place.py on Adam
        assert torch.equal(published[name], sent[name])


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


def test_a_pack_costs_what_its_documents_and_its_loss_rows_cost(tmp_path):
    costs = rank_of(tmp_path, "llama").costs
    packs = packs_of([40, 9, 30, 7], trained=5)
    assert sum(map(costs.of, packs)) == costs.counts.step([40, 9, 30, 7], 20)
    assert costs.of(packs_of([60])[0]) > costs.of(packs_of([30, 30])[0]), "a pair of positions counts"


def test_a_time_becomes_flops_a_second_and_a_share_only_where_the_peak_is_known(tmp_path):
    costs = rank_of(tmp_path, "qwen3").costs
    packs = packs_of([40, 9, 30, 7])
    found = costs.metrics(packs, 0.5, ranks=2, pack_tokens=64)
    assert list(found) == ["perf/tflops"], "the peak of a CPU is not known, and not guessed"
    assert found["perf/tflops"] * 1e12 * 0.5 * 2 == pytest.approx(sum(map(costs.of, packs)))
    known = replace(costs, peak=1e12).metrics(packs, 0.5, ranks=2, pack_tokens=64)
    assert known["perf/mfu"] == pytest.approx(known["perf/tflops"])
    assert known["perf/mfu_palm"] == pytest.approx(costs.counts.palm(86, 64) / 1e12)
    unknown = Costs(counts=None, linear=2.0, quadratic=1.0, peak=1e12)
    assert unknown.metrics(packs, 0.5, ranks=2, pack_tokens=64) == {} and unknown.of(packs_of([10])[0]) > 0
