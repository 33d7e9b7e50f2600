"""One bit of one weight that differs between replicas is seen, and the rank that it is on is named."""

import asyncio
from pathlib import Path

import pytest
import torch

from actors import EngineRank
from posttrain.compute.cluster import Gang, ray_cluster
from posttrain.compute.replicas import CHECK_EVERY, check_replicas, replica
from posttrain.compute.workers import ActorGroup
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.errors import ComputeError
from posttrain.model.losses.sft import SFTLoss
from tiny import tiny_model


def weights() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def test_replicas_with_the_same_bits_pass_and_other_tensors_are_not_compared():
    other = weights() | {"a": torch.zeros(1, 3)}
    check_replicas([replica(weights().items()), replica(weights().items()), replica(other.items())], step=1)


@pytest.mark.fault("F43", outcome="STOP")
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_flipped_bit_names_the_rank_that_differs_from_most(name: str):
    odd = weights()
    odd[name].view(torch.int32 if name == "a" else torch.int16).view(-1)[-1] ^= 1
    found = [replica(weights().items()), replica(odd.items()), replica(weights().items())]
    with pytest.raises(ComputeError, match="step 7: weights of policy 1 differ from those of its replicas"):
        check_replicas(found, step=7)


@pytest.mark.slow
@pytest.mark.fault("F43", outcome="STOP")
def test_ranks_that_train_find_a_bit_that_flipped_in_one_of_them_before_the_weights_change_again(tmp_path: Path):
    folder = str(tiny_model(tmp_path))
    packs = pack([(shift(list(range(3, 20)), [1.0] * 17),)], pack_tokens=64)

    async def work() -> None:
        group = ActorGroup("policy", EngineRank, [{"rank": r, "world_size": 2, "folder": folder} for r in range(2)])
        address = await group.call_one(0, "address", timeout_s=60)
        await group.call("join", address, timeout_s=60)
        for step in (CHECK_EVERY - 1, CHECK_EVERY):  # sound ones pass the check
            await group.call("train", step, packs, SFTLoss(), 2 * 17.0, timeout_s=60)
        await group.call_one(1, "flip_a_bit", timeout_s=60)
        before = await group.call_one(0, "parameters", timeout_s=60)
        with pytest.raises(ComputeError, match="weights of policy 0, 1 differ though they are replicas"):
            await group.call("train", 2 * CHECK_EVERY, packs, SFTLoss(), 2 * 17.0, timeout_s=60)
        after = await group.call_one(0, "parameters", timeout_s=60)
        assert all((old == new).all() for old, new in zip(before, after, strict=True))

    with ray_cluster(Gang(), num_cpus=3, num_gpus=0):
        asyncio.run(work())
