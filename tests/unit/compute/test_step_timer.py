"""The seconds of a step by what they went to; together they are the step."""

import time

import numpy as np
import torch

from actors import tiny_engine
from posttrain.compute.collective import Ranks
from posttrain.compute.step_timer import StepTimer
from posttrain.data.batch import collate
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.model.losses.sft import SFTLoss
from tiny import tiny_model

CPU = torch.device("cpu")


def test_time_goes_to_the_name_of_the_next_mark():
    timer = StepTimer(CPU)
    for _ in range(2):
        time.sleep(0.02)
        timer.mark("forward")
        time.sleep(0.05)
        timer.mark("backward")
    timer.synced()
    time.sleep(0.03)
    timer.mark("optimizer")
    found = timer.metrics()
    assert set(found) == {"time/forward_s", "time/backward_s", "time/optimizer_s"}
    assert found["time/forward_s"] >= 0.04 and found["time/backward_s"] >= 0.1 and found["time/optimizer_s"] >= 0.03
    assert found["time/backward_s"] > 1.5 * found["time/forward_s"]


def test_the_parts_of_an_engine_step_add_up_to_it(tmp_path):
    engine = tiny_engine(str(tiny_model(tmp_path)), Ranks(rank=0, world_size=1, meeting="", timeout_s=1, device=CPU))
    ids = np.random.default_rng(0).integers(0, 200, 60).tolist()
    packs = pack([(shift(ids, [1.0] * 60),)] * 4, pack_tokens=64)
    batches = [collate(each, pack_tokens=64) for each in packs]
    gaps = []
    for step in range(5):
        started = time.perf_counter()
        found = engine.train_step(step, batches, SFTLoss(), denominator=sum(p.loss_tokens for p in packs))
        took = time.perf_counter() - started
        parts = {name: value for name, value in found.items() if name.startswith("time/")}
        assert set(parts) == {f"time/{name}_s" for name in ("forward", "backward", "reduce", "optimizer")}
        assert min(parts.values()) > 0
        gaps.append(1 - sum(parts.values()) / took)
    assert min(gaps) >= 0 and sorted(gaps)[2] < 0.05, "the median, for the process may be put to sleep between"
