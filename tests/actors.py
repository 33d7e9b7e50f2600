"""Classes for tests that put them into processes of their own, where they must be importable."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import torch

from posttrain.compute.collective import MeetingPoint, Ranks
from posttrain.compute.engine import Engine, ModelFunctions
from posttrain.compute.generator.transformers import TransformersGenerator
from posttrain.compute.master import Masters
from posttrain.data.batch import collate
from posttrain.data.types import Pack
from posttrain.model.forward import forward, loss_sum
from posttrain.model.load import load_decoder
from posttrain.model.optim import adamw
from posttrain.model.weights import hf_tensors


class ForgetfulGenerator(TransformersGenerator):
    """Loses the weights of the second sync, and answers as if it held them: the fault that hides for weeks."""

    def sync(self, version, weights):
        if version == 1:
            held = dict(self.model.named_parameters()) | self._adapters
            weights = {name: held[name] for name in weights}
        return super().sync(version, weights)


class HangingGenerator(TransformersGenerator):
    """Never answers."""

    def generate(self, requests):
        time.sleep(3600)
        return super().generate(requests)


class DyingTransformers(TransformersGenerator):
    """The first of its kind dies in a call once it has the weights of version 1."""

    def generate(self, requests):
        mark = Path("a_generator_died")
        if self.version == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(requests)


class EngineRank:
    """One rank of a data-parallel engine over tiny weights."""

    def __init__(self, rank: int, world_size: int, folder: str):
        self.rank, self.world_size, self.folder = rank, world_size, folder
        self.meeting = MeetingPoint("127.0.0.1") if rank == 0 else None

    def address(self) -> str:
        assert self.meeting is not None
        return self.meeting.address

    def join(self, address: str) -> None:
        ranks = Ranks(
            rank=self.rank,
            world_size=self.world_size,
            meeting=self.meeting or address,
            timeout_s=60,
            device=torch.device("cpu"),
        )
        self.engine = tiny_engine(self.folder, ranks)

    def train(self, step: int, packs: list[Pack], loss, denominator: float) -> dict[str, float]:
        batches = [collate(pack, pack_tokens=64) for pack in packs]
        return self.engine.train_step(step, batches, loss, denominator=denominator)

    def flip_a_bit(self) -> None:
        """The last of one weight, as a defective memory would."""
        weight = next(self.engine.model.parameters()).detach()
        weight.view(torch.int32).view(-1)[0] ^= 1

    def parameters(self) -> list[np.ndarray]:
        return [p.detach().numpy().copy() for p in self.engine.model.parameters()]


def tiny_engine(folder: str, ranks: Ranks, *, precision: str = "float32") -> Engine:
    """An engine over the model in `folder` on the ranks' device, constant learning rate."""
    dtype = torch.bfloat16 if precision == "bfloat16_stochastic" else torch.float32
    return engine_over(load_decoder(folder, device=ranks.device, dtype=dtype), hf_tensors, ranks, precision=precision)


def engine_over(model, named_weights, ranks: Ranks, *, precision: str = "float32") -> Engine:
    """An engine over any model that forward() takes, constant learning rate."""
    masters = Masters(model) if precision == "bfloat16" else None
    stochastic = precision == "bfloat16_stochastic"
    trained = model.parameters() if masters is None else masters
    return Engine(
        model,
        adamw(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, stochastic=stochastic),
        ranks=ranks,
        functions=ModelFunctions(forward=forward, loss_sum=loss_sum, named_weights=named_weights),
        lr_scale=lambda step: 1.0,
        max_grad_norm=1.0,
        masters=masters,
    )
