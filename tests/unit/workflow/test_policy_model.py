"""The reference of DPO, three ways: a frozen copy, the model without its adapters, a column of the data."""

import asyncio
from pathlib import Path

import pytest

from posttrain.compute.mesh import Sizes
from posttrain.data.pack import pack
from posttrain.data.token_files import read_units
from posttrain.data.types import Pack, Unit
from posttrain.model.lora import LoRA
from posttrain.workflow.policy_model import Build
from posttrain.workflow.policy_rank import PolicyRank
from posttrain.workflow.reference import score
from runs import Prepared, prepared, recipe_config
from steps.recipes import loss_of, training_of
from steps.streams import HELD_OUT_UNITS

CONFIG = recipe_config("dpo", **{"optim.lr": 1e-2, "optim.warmup_steps": 0, "warmup": None})


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("run"), CONFIG)


@pytest.fixture(scope="module")
def units(base: Prepared) -> list[Unit]:
    return read_units(Path(base.tokens_uri) / HELD_OUT_UNITS)


def rank_of(base: Prepared, *, reference: bool, lora: LoRA | None) -> PolicyRank:
    facts = {"backend": "posttrain", "training": training_of(CONFIG, "dpo"), "build": Build(lora=lora)}
    rank = PolicyRank(rank=0, sizes=Sizes(data=1), model_uri=base.model_uri, reference=reference, **facts)
    rank.address()
    rank.join("", 60.0)
    return rank


class OneRank:
    """A policy of one rank in this process."""

    pack_tokens = CONFIG.data.pack_tokens

    def __init__(self, rank: PolicyRank):
        self.rank = rank

    async def document_logprobs(self, packs: list[Pack]) -> list[list[float]]:
        return self.rank.document_logprobs(packs)


def losses(rank: PolicyRank, units: list[Unit]) -> list[float]:
    packs, loss = pack(units, pack_tokens=CONFIG.data.pack_tokens), loss_of(CONFIG, "dpo")
    return [rank.train_step(step, packs, loss, float(len(units)))["loss"] for step in range(4)]


@pytest.mark.parametrize("lora", [None, LoRA(rank=4, alpha=8.0)])
def test_a_reference_beside_the_policy_and_one_in_a_column_give_the_same_losses(base, units, lora):
    beside = losses(rank_of(base, reference=True, lora=lora), units)
    rank = rank_of(base, reference=False, lora=lora)
    scored = asyncio.run(score(OneRank(rank), units))  # pyright: ignore[reportArgumentType]
    assert [[len(sample) for sample in unit] for unit in scored] == [[len(s) for s in unit] for unit in units]
    column = losses(rank, scored)
    assert column == pytest.approx(beside, abs=1e-5)
    assert beside[-1] < beside[0] - 0.01, "the policy has left its reference, or nothing was compared"


def test_adapters_leave_the_weights_alone(base, units):
    rank = rank_of(base, reference=False, lora=LoRA(rank=4))
    frozen = {name: p.clone() for name, p in rank.engine.model.named_parameters() if "adapter" not in name}
    losses(rank, asyncio.run(score(OneRank(rank), units)))  # pyright: ignore[reportArgumentType]
    now = dict(rank.engine.model.named_parameters())
    assert all(now[name].equal(before) for name, before in frozen.items())
