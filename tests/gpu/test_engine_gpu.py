"""Training state on a CUDA device survives a restore."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from actors import tiny_engine
from posttrain import storage
from posttrain.compute.collective import MeetingPoint, Ranks
from posttrain.compute.mesh import Sizes
from posttrain.data.batch import collate
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.errors import ComputeError
from posttrain.model.float8 import CAPABILITY
from posttrain.model.losses.sft import SFTLoss
from posttrain.workflow.policy_rank import PolicyRank
from posttrain.workflow.training import Training
from tiny import tiny_model
from tiny_families import random_config, random_model

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


def rank_of(folder: str, **settings) -> PolicyRank:
    training = Training(
        num_steps=8,
        lr=1e-3,
        schedule="constant",
        warmup_steps=0,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        max_grad_norm=1.0,
        pack_tokens=256,
        **settings,
    )
    rank = PolicyRank(
        rank=0, sizes=Sizes(data=1), model_uri=folder, backend="posttrain", training=training, reference=False
    )
    rank.meeting = MeetingPoint("127.0.0.1")  # rank.address() asks Ray, which a bare GPU machine need not have
    rank.join("", 60.0)
    return rank


def steps_of(rank: PolicyRank, steps: range) -> list[float]:
    losses = []
    for step in steps:
        rng = np.random.default_rng(step)
        units = [(shift(rng.integers(0, 200, n).tolist(), [1.0] * n),) for n in (90, 60, 40, 30)]
        packs = pack(units, pack_tokens=256)
        losses.append(rank.train_step(step, packs, SFTLoss(), sum(p.loss_tokens for p in packs))["loss"])
    return losses


@pytest.fixture(scope="module")
def model_uri(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    random_model(random_config("qwen3", 3) | {"vocab_size": 200, "head_dim": 64}, folder / "made", std=0.05)
    storage.publish(folder / "made", str(folder / "model"))
    return str(folder / "model")


def test_a_gpu_rank_computes_in_bfloat16_beside_float32_and_learns_as_float32_does(model_uri):
    ranks = {name: rank_of(model_uri, precision=name) for name in ("float32", "auto", "bfloat16_stochastic")}
    losses = {name: steps_of(rank, range(8)) for name, rank in ranks.items()}
    assert next(ranks["auto"].engine.model.parameters()).dtype == torch.bfloat16
    assert losses["auto"] == pytest.approx(losses["float32"], rel=1e-2)
    assert losses["bfloat16_stochastic"] == pytest.approx(losses["float32"], rel=2e-2)


def test_checkpointed_activations_change_no_loss_beyond_rounding(model_uri):
    expected = steps_of(rank_of(model_uri), range(3))
    for mode in ("selective", "full"):
        assert steps_of(rank_of(model_uri, activation_checkpointing=mode), range(3)) == pytest.approx(
            expected, rel=1e-2
        )


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < CAPABILITY,
    reason="needs compute capability 8.9",
)
def test_a_rank_trains_in_float8_like_in_bfloat16_however_it_recomputes(tmp_path):
    config = random_config("qwen3", 1) | {"head_dim": 64, "hidden_size": 128, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "intermediate_size": 256, "vocab_size": 256}
    random_model(config, tmp_path / "made", std=0.05)
    storage.publish(tmp_path / "made", folder := str(tmp_path / "model"))
    expected = steps_of(rank_of(folder, precision="bfloat16"), range(4))
    for settings in (
        {"precision": "float8"},
        {"precision": "float8_stochastic"},
        {"precision": "float8", "activation_checkpointing": "selective"},
        {"precision": "float8", "activation_checkpointing": "full"},
    ):
        rank = rank_of(folder, **settings)
        narrow = settings["precision"] == "float8_stochastic"
        state = {tensor.dtype for name, tensor in rank.engine.state().items() if name.startswith("model.")}
        assert state == {torch.bfloat16 if narrow else torch.float32}
        found = steps_of(rank, range(4))
        assert found != expected and found == pytest.approx(expected, rel=3e-2), settings


def test_a_deterministic_rank_resumes_to_the_same_bits(model_uri):
    code = (
        "import sys, test_engine_gpu as t, torch\n"
        "rank = t.rank_of(sys.argv[1], deterministic=True)\n"
        "losses = t.steps_of(rank, range(2))\n"
        "saved = {n: x.cpu().clone() for n, x in rank.engine.state().items()}\n"
        "losses += t.steps_of(rank, range(2, 4))\n"
        "end = {n: x.cpu().clone() for n, x in rank.engine.state().items()}\n"
        "rank = t.rank_of(sys.argv[1], deterministic=True)\n"
        "[x.copy_(saved[n]) for n, x in rank.engine.state_to_fill().items()]\n"
        "rank.engine.filled()\n"
        "assert t.steps_of(rank, range(2, 4)) == losses[2:], losses\n"
        "assert all(torch.equal(x.cpu(), end[n]) for n, x in rank.engine.state().items())\n"
    )
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *sys.path])
    # A process of its own: the mode is the process's, and cuBLAS must not have been used before it.
    done = subprocess.run(
        [sys.executable, "-c", code, model_uri], env=os.environ | {"PYTHONPATH": path}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]


def test_a_full_gpu_is_named(model_uri):
    rank = rank_of(model_uri)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total)
    try:
        with pytest.raises(ComputeError, match=r"step 1: out of GPU memory with 1 packs.*\n.*in use: .*\nplanned: "):
            steps_of(rank, range(1))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
