"""The engine: the same step for one rank and for two, restored to the bit, stopped by NaN before it does harm."""

import asyncio
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from actors import EngineRank, tiny_engine
from posttrain.compute.cluster import Gang, ray_cluster
from posttrain.compute.collective import Ranks
from posttrain.compute.workers import ActorGroup
from posttrain.data.batch import collate
from posttrain.data.pack import deal, pack
from posttrain.data.sample import shift
from posttrain.data.types import Pack
from posttrain.errors import ComputeError
from posttrain.model.losses.sft import SFTLoss
from tiny import tiny_model


def one_rank() -> Ranks:
    return Ranks(rank=0, world_size=1, meeting="", timeout_s=1, device=torch.device("cpu"))


def packs_of(seed: int, units: int = 9) -> list[Pack]:
    rng = np.random.default_rng(seed)
    samples = [rng.integers(0, 200, rng.integers(5, 40)).tolist() for _ in range(units)]
    return pack([(shift(ids, [1.0] * len(ids)),) for ids in samples], pack_tokens=64)


def train(engine, steps: range) -> list[dict[str, float]]:
    history = []
    for step in steps:
        packs = packs_of(step)
        batches = [collate(p, pack_tokens=64) for p in packs]
        history.append(engine.train_step(step, batches, SFTLoss(), denominator=sum(p.loss_tokens for p in packs)))
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in history]


def test_loss_goes_down(tmp_path: Path):
    engine = tiny_engine(str(tiny_model(tmp_path)), one_rank())
    packs = packs_of(0)
    batches = [collate(p, pack_tokens=64) for p in packs]
    losses = [
        engine.train_step(s, batches, SFTLoss(), denominator=sum(p.loss_tokens for p in packs))["loss"]
        for s in range(60)
    ]
    assert losses[0] == pytest.approx(math.log(engine.model.config.vocab_size), rel=0.1)
    assert losses[-1] < 0.8 * losses[0]


def test_two_ranks_take_the_same_step_as_one(tmp_path: Path):
    folder = str(tiny_model(tmp_path))
    alone = tiny_engine(folder, one_rank())
    expected = train(alone, range(3))

    async def together() -> tuple[list[dict[str, float]], list[list[np.ndarray]]]:
        group = ActorGroup("rank", EngineRank, [{"rank": r, "world_size": 2, "folder": folder} for r in range(2)])
        address = await group.call_one(0, "address", timeout_s=60)
        await group.call("join", address, timeout_s=60)
        history = []
        for step in range(3):
            packs = packs_of(step)
            total = sum(p.loss_tokens for p in packs)
            # step 1 gives rank 1 nothing at all: its gradient is zero and it still takes part
            shares = [packs, []] if step == 1 else deal(packs, ranks=2, cost=lambda p: p.num_tokens)
            calls = [((step, share, SFTLoss(), total), {}) for share in shares]
            first, second = await group.call_each("train", calls, timeout_s=60)
            strip = {k: v for k, v in first.items() if not k.startswith("time/")}
            assert strip == {k: v for k, v in second.items() if not k.startswith("time/")}
            history.append(strip)
        return history, await group.call("parameters", timeout_s=60)

    with ray_cluster(Gang(), num_cpus=3, num_gpus=0):
        history, parameters = asyncio.run(together())
    for ours, theirs in zip(history, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for first, second, reference in zip(*parameters, alone.model.parameters(), strict=True):
        assert np.array_equal(first, second), "ranks drifted apart"
        np.testing.assert_allclose(first, reference.detach().numpy(), atol=2e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16_stochastic"])
def test_restored_state_continues_bitwise(tmp_path: Path, precision: str):
    folder = str(tiny_model(tmp_path))
    whole = tiny_engine(folder, one_rank(), precision=precision)
    expected = train(whole, range(6))
    first = tiny_engine(folder, one_rank(), precision=precision)
    train(first, range(3))
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    second = tiny_engine(folder, one_rank(), precision=precision)
    for name, tensor in second.state_to_fill().items():
        tensor.copy_(state.pop(name))
    assert not state
    second.filled()
    assert train(second, range(3, 6)) == expected[3:]
    assert all(torch.equal(p, q) for p, q in zip(second.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.fault("F42", outcome="STOP")
def test_nan_stops_before_the_weights_change(tmp_path: Path, noticed):
    engine = tiny_engine(str(tiny_model(tmp_path)), one_rank())
    before = [p.detach().clone() for p in engine.model.parameters()]
    (first, *_), loss = packs_of(0), SFTLoss()
    batch = collate(first, pack_tokens=64)
    batch.loss_mask[0] = float("nan")
    with noticed(), pytest.raises(ComputeError, match="the weights were not changed"):
        engine.train_step(0, [batch], loss, denominator=first.loss_tokens)
    assert all(torch.equal(p, q) for p, q in zip(engine.model.parameters(), before, strict=True))
    assert all(p.grad is None for p in engine.model.parameters())


@pytest.mark.fault("F44", outcome="STOP")
@pytest.mark.parametrize("kl", [math.inf, math.nan])
def test_a_kl_that_is_no_number_stops_before_the_weights_change_though_the_gradient_is_one(tmp_path: Path, kl: float):
    def loss_fn(output, batch):
        loss, metrics = SFTLoss()(output, batch)
        return loss, metrics | {"kl": torch.full((), kl)}

    loss_fn.reads, loss_fn.temperature = SFTLoss.reads, 1.0
    engine = tiny_engine(str(tiny_model(tmp_path)), one_rank())
    before = [p.detach().clone() for p in engine.model.parameters()]
    first = packs_of(0)[0]
    with pytest.raises(ComputeError, match=r"'kl': (inf|nan).*the weights were not changed"):
        engine.train_step(0, [collate(first, pack_tokens=64)], loss_fn, denominator=first.loss_tokens)
    assert all(torch.equal(p, q) for p, q in zip(engine.model.parameters(), before, strict=True))


def test_bfloat16_with_masters_follows_float32(tmp_path: Path):
    """Closely enough that the drift is bfloat16's rounding of the forward; a lost update would grow with the steps."""
    folder = str(tiny_model(tmp_path))
    wide, narrow = (tiny_engine(folder, one_rank(), precision=p) for p in ("float32", "bfloat16"))
    expected, found = train(wide, range(10)), train(narrow, range(10))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
    assert {tensor.dtype for tensor in narrow.state().values()} == {torch.float32}
    for name, parameter in narrow.model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, narrow.state()[f"model.{name}"].bfloat16()), (
            "the model computes with the rounding"
        )
