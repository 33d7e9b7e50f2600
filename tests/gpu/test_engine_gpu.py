"""Training state on a CUDA device survives a restore."""

from pathlib import Path

import numpy as np
import pytest
import torch

from actors import tiny_engine
from posttrain.compute.collective import Ranks
from posttrain.data.batch import collate
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.model.losses.sft import SFTLoss
from tiny import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_restored_engine_continues_on_the_gpu(tmp_path: Path):
    folder = str(tiny_model(tmp_path))
    ranks = Ranks(rank=0, world_size=1, meeting="", timeout_s=1, device=torch.device("cuda"))

    def train(engine, steps: range) -> list[float]:
        losses = []
        for step in steps:
            ids = np.random.default_rng(step).integers(0, 200, 50).tolist()
            (only,) = pack([(shift(ids, [1.0] * 50),)], pack_tokens=64)
            batch = collate(only, pack_tokens=64).to("cuda")
            losses.append(engine.train_step(step, [batch], SFTLoss(), denominator=only.loss_tokens)["loss"])
        return losses

    whole = tiny_engine(folder, ranks)
    expected = train(whole, range(6))
    first = tiny_engine(folder, ranks)
    train(first, range(3))
    saved = {name: tensor.cpu() for name, tensor in first.state().items()}
    second = tiny_engine(folder, ranks)
    for name, tensor in second.state_to_fill().items():
        tensor.copy_(saved[name])
    assert train(second, range(3, 6)) == pytest.approx(expected[3:], rel=1e-5)
