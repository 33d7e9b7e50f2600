"""A critic and a teacher on a mesh say and learn what one rank does."""

import asyncio

import numpy as np
import pytest

from posttrain import storage
from posttrain.compute.cluster import Gang, ray_cluster
from posttrain.compute.mesh import Sizes
from posttrain.compute.pool import Pool
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.data.types import Pack
from posttrain.model.losses.policy_gradient import ClippedLoss
from posttrain.model.losses.value import ValueLoss
from posttrain.workflow.policy import Policy
from posttrain.workflow.policy_model import Build
from posttrain.workflow.policy_rank import PolicyRank
from tiny_families import random_config, random_model
from tiny_training import TRAINING

ALL = ("values", "ref_logprobs", "teacher")
LOSS = ValueLoss(policy=ClippedLoss(temperature=1.0))


def rollouts() -> list[Pack]:
    """Three packs, so that one of two data ranks takes one along that counts nothing."""
    rng, units = np.random.default_rng(0), []
    for n in (40, 35, 30):
        silent = [0.0] * 20
        names = ("sampler_logprobs", "advantages", "values", "returns")
        columns = {name: silent + (0.1 * rng.normal(size=n)).tolist() for name in names}
        columns["sampler_logprobs"] = silent + (-4.5 + 0.1 * rng.normal(size=n)).tolist()
        units.append((shift(rng.integers(1, 97, 20 + n).tolist(), silent + [1.0] * n, **columns),))
    return pack(units, pack_tokens=64)


@pytest.mark.slow
def test_a_critic_and_a_teacher_on_a_mesh_are_those_of_one_rank(tmp_path):
    for name, family in (("student", "qwen2"), ("teacher", "llama")):
        random_model(random_config(family, 1) | {"vocab_size": 97}, tmp_path / f"{name}_made", std=0.05)
        storage.publish(tmp_path / f"{name}_made", str(tmp_path / name))
    build = Build(value_head=True, teacher_uri=str(tmp_path / "teacher"))
    facts = {"model_uri": str(tmp_path / "student"), "backend": "posttrain", "training": TRAINING, "reference": True}
    packs = rollouts()

    async def together():
        sizes = Sizes(data=2, tensor=2)
        policy = await Policy.launch(sizes=sizes, timeout_s=60, pool=Pool(), build=build, **facts)
        steps = [await policy.train_step(step, packs, LOSS) for step in range(2)]
        return steps, await policy.token_scores(packs, ALL, 0.8)

    with ray_cluster(Gang(), num_cpus=5, num_gpus=0):
        steps, scores = asyncio.run(together())
    alone = PolicyRank(rank=0, sizes=Sizes(data=1), build=build, **facts)
    alone.address()
    alone.join("", 60.0)
    tokens = sum(each.loss_tokens for each in packs)
    expected = [alone.train_step(step, packs, LOSS, tokens) for step in range(2)]
    for found, theirs in zip(steps, expected, strict=True):
        for name in ("loss", "value/loss", "kl", "grad_norm"):
            assert found[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    for found, theirs in zip(scores, alone.token_scores(packs, ALL, 0.8), strict=True):
        for name in ALL:
            np.testing.assert_allclose(found[name], theirs[name], atol=2e-3)  # after two steps of Adam at 1e-2
    assert (scores[0]["values"] != 0).all()
