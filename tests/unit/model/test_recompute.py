"""Activation checkpointing changes what the backward makes again, and not one bit of the gradients."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.data.batch import collate
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.model.forward import loss_sum
from posttrain.model.load import load_decoder
from posttrain.model.losses.sft import SFTLoss
from posttrain.model.recompute import MODES
from tiny_families import FAMILIES, random_config, random_model


class Counted(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name().removeprefix("aten::").split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def run(model, batch, mode):
    """Gradients, the operations of forward and backward, and how many tensors the graph held between them."""
    model.zero_grad()
    model.checkpoint_activations(mode)
    kept: set[int] = set()

    def note(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with Counted() as counted:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss, _ = loss_sum(model, batch, SFTLoss())
        loss.backward()
    return [p.grad.clone() for p in model.parameters()], counted.calls, len(kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_modes_make_again_what_they_say_and_give_the_same_gradients(family, tmp_path):
    config = random_config(family, 0) | {"vocab_size": 97}
    model = load_decoder(random_model(config, tmp_path / "model"))
    rng = np.random.default_rng(0)
    (only,) = pack([(shift(rng.integers(1, 97, n).tolist(), [1.0] * n),) for n in (30, 20, 9)], pack_tokens=64)
    batch = collate(only, pack_tokens=64)
    gradients, calls, kept = run(model, batch, "none")
    for mode in MODES[1:]:
        again, more, _ = run(model, batch, mode)
        assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True)), mode
        matmuls = ("mm", "addmm")
        same = all(more[name] == calls[name] for name in matmuls)
        assert same == (mode == "selective"), f"{mode}: matmuls {[(n, calls[n], more[n]) for n in matmuls]}"
        assert more["mul"] > calls["mul"], f"{mode} makes the cheap operations again"
    assert run(model, batch, "full")[2] < kept / 2
