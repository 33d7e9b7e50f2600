"""A disk that is full over several saves: training goes on and says so each time, until too much work is unsaved."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain import storage
from posttrain.compute.mesh import Sizes
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.errors import StorageError
from posttrain.model.losses.sft import SFTLoss
from posttrain.workflow.clock import SaveClock
from posttrain.workflow.policy_rank import PolicyRank
from posttrain.workflow.saving import LOST_WORK_SAVES, Saver
from posttrain.workflow.stopping import StopSignal
from posttrain.workflow.training import Training
from saves import checkpoints
from small_disk import small_disk
from tiny_families import random_config, random_model

PACKS = pack([(shift([5, 6, 7, 8], [0.0, 1.0, 1.0, 1.0]),)], pack_tokens=8)
STEPS = 20


class OneRank:
    """A group of one policy rank, in this process."""

    def __init__(self, folder: Path):
        random_model(random_config("llama", 1) | {"vocab_size": 97}, folder / "made", std=0.05)
        storage.publish(folder / "made", str(folder / "model"))
        options = {"num_steps": STEPS, "lr": 1e-2, "schedule": "constant", "warmup_steps": 0, "betas": (0.9, 0.95)}
        training = Training(**options, weight_decay=0.0, max_grad_norm=1.0, pack_tokens=8)
        model = {"model_uri": str(folder / "model"), "backend": "posttrain", "reference": False}
        self.rank = PolicyRank(rank=0, sizes=Sizes(data=1), training=training, **model)
        self.rank.address()
        self.rank.join("", 60.0)

    def __len__(self) -> int:
        return 1

    async def call(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        return [getattr(self.rank, method)(*args)]

    async def call_one(self, rank: int, method: str, *args: Any, timeout_s: float) -> Any:
        return (await self.call(method, *args, timeout_s=timeout_s))[rank]


@pytest.fixture
def disk(tmp_path: Path):
    with small_disk(tmp_path / "disk") as size:
        size(100_000)
        yield tmp_path / "disk"


@pytest.fixture
def group(tmp_path: Path) -> OneRank:
    return OneRank(tmp_path)


def fill(disk: Path) -> Path:
    """Take all that is left of a disk."""
    path = disk / "others"
    with open(path, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"\0" * 4096)
    return path


def saver_of(group: OneRank, saved, *, every_seconds: float) -> Saver:
    policy: Any = SimpleNamespace(group=group, timeout_s=60.0)
    clock = SaveClock(num_steps=STEPS, every_steps=1, every_seconds=every_seconds)
    return Saver(policy, saved, clock=clock, stop=StopSignal())


async def step(saver: Saver, group: OneRank, number: int) -> None:
    group.rank.train_step(number, PACKS, SFTLoss(), 3.0)
    await saver.after_step(number, lambda: {"step": number})


@pytest.mark.fault("F12", outcome="CONTINUE")
def test_three_saves_lost_to_a_full_disk_are_told_and_counted_and_the_fourth_is_good(
    disk, group, capsys, record_property
):
    async def train() -> None:
        with checkpoints(disk / "saved").writing() as saved:
            saver = saver_of(group, saved, every_seconds=3600.0)
            await step(saver, group, 1)
            others = fill(disk)
            for number in (2, 3, 4):
                await step(saver, group, number)
                assert saver.metrics() == {"checkpoint/failures": number - 1}
                assert saved.latest().step == 1, "the last good one stays"
            record_property("lost_saves", saver.metrics()["checkpoint/failures"])
            others.unlink()
            await step(saver, group, 5)
            assert saved.latest().step == 5 and saver.failures == 3

    asyncio.run(train())
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: a checkpoint failed")]
    assert len(said) == 3 and all("s of work are unsaved" in line and "are needed" in line for line in said)


@pytest.mark.fault("F12", outcome="STOP")
def test_a_run_stops_once_more_work_is_unsaved_than_it_may_lose(disk, group, noticed):
    async def train() -> None:
        with checkpoints(disk / "saved").writing() as saved:
            saver = saver_of(group, saved, every_seconds=0.05)
            await step(saver, group, 1)
            fill(disk)
            start = time.monotonic()
            with noticed(), pytest.raises(StorageError, match="are needed"):
                for number in range(2, STEPS * 1000):
                    await step(saver, group, number % (STEPS - 1))
            assert time.monotonic() - start > LOST_WORK_SAVES * 0.05 - 0.05 and saver.failures > 1
            assert saved.latest().step == 1

    asyncio.run(train())
