"""A step launches, computes and writes what tests/golden/operation_counts.json says; no time is taken."""

import json

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from operation_counts import CASES, GOLDEN, counts, graphs
from posttrain.data.batch import collate
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.data.types import Batch
from posttrain.model.collectives import Group
from posttrain.model.decoder import Decoder
from posttrain.model.families import decoder_config
from posttrain.model.forward import loss_sum
from posttrain.model.load import load_decoder
from posttrain.model.losses.sft import SFTLoss
from tiny import tiny_model
from tiny_families import random_config

TOLERANCE = 0.002
"""Below one operation more in each of the two layers."""
COMMITTED = json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_step_does_the_work_that_was_committed(name: str):
    found, expected = counts(CASES[name]), COMMITTED["cases"][name]
    exact = {key: (expected[key], found[key]) for key in ("matmuls", "flops") if found[key] != expected[key]}
    near = {} if torch.__version__.split("+")[0] != COMMITTED["torch"] else {
        key: (expected[key], found[key])
        for key in ("operations", "bytes_written")
        if abs(found[key] / expected[key] - 1) > TOLERANCE
    }  # fmt: skip
    assert not exact | near, (
        f"a step of {name!r} does other work than was committed (was, is): {exact | near}. More of it is slower: undo "
        "it, or, where it is wanted or less, renew the counts by `make golden` and say in the commit what they buy"
    )


@pytest.fixture
def only_graphs(monkeypatch):
    """Compiling makes graphs, those of a GPU, and no code for them, which takes a minute; they are counted from 0."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled(self, **how, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("only_graphs")
def test_blocks_of_other_documents_compile_no_further_graph_and_break_none(tmp_path):
    model = load_decoder(tiny_model(tmp_path), device="cpu", dtype=torch.float32)
    model.attention = "flex"
    model.compile_blocks()
    rng = np.random.default_rng(0)

    def step(seed: int) -> None:
        lengths = rng.multinomial(200, rng.dirichlet(np.ones(2 + seed))) + 1
        samples = [shift(rng.integers(0, 200, n + 1), np.ones(n + 1)) for n in lengths]
        (made,) = pack([(sample,) for sample in samples], pack_tokens=256)
        with torch.no_grad():  # FlexAttention has no backward on a CPU; tests/gpu/test_model_gpu.py runs one
            loss_sum(model, collate(made, pack_tokens=256), SFTLoss())

    first, after = graphs(step, warm=1, more=4)
    assert first == 1, "the two layers share one graph"
    assert after == first, (
        f"{after - first} graphs more for batches of other documents: a length is a part of the graph"
    )
    assert not counters["graph_break"], dict(counters["graph_break"])


@pytest.mark.usefixtures("only_graphs")
def test_an_exchange_of_rows_between_experts_stays_out_of_the_graphs():
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = Decoder(decoder_config(random_config("qwen3_moe", 4)))
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.3)
        batches = [row_batch(40, seed) for seed in range(4)]
        with torch.no_grad():
            expected = [model(batch) for batch in batches]
            for layer in model.layers:
                layer.mlp.expert = Group(torch.distributed.group.WORLD.group_name, size=1, rank=0)
            model.compile_blocks()
            first, after = graphs(lambda n: torch.testing.assert_close(model(batches[n]), expected[n]), warm=1, more=3)
        assert first == after > 0, "how many rows go where is a part of a graph"
    finally:
        torch.distributed.destroy_process_group()


def row_batch(tokens: int, seed: int) -> Batch:
    ids = np.random.default_rng(seed).integers(0, 32, tokens + 1)
    (made,) = pack([(shift(ids, np.ones(tokens + 1)),)], pack_tokens=tokens)
    return collate(made, pack_tokens=tokens)
