"""Float32 twins of bfloat16 parameters: sums of many micro-batches, small updates, and what is not trained."""

import torch
from torch import nn

from posttrain.compute.master import Masters


def a_linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 4)


def test_micro_batches_add_up_in_float32():
    model = a_linear()
    masters, x = Masters(model), torch.ones(1, 8, dtype=torch.bfloat16)
    for _ in range(1024):  # a bfloat16 sum of equal terms stands still from the 256th on
        model(x).sum().backward()
    assert torch.equal(masters.of(model.weight).grad, torch.full((4, 8), 1024.0))
    assert model.weight.grad is None, "nothing is held twice"


def test_updates_below_a_bfloat16_add_up_until_they_show():
    model = a_linear()
    masters = Masters(model)
    weight, twin = model.weight, masters.of(model.weight)
    with torch.no_grad():
        twin.fill_(1.0)
        for _ in range(100):
            twin -= 1e-4
            masters.publish()
    assert torch.allclose(weight.float(), torch.full((4, 8), 0.99), atol=2**-8)
    assert not torch.equal(weight, torch.ones_like(weight))


def test_a_parameter_that_is_not_trained_has_no_twin():
    model = a_linear()
    model.bias.requires_grad_(False)
    masters = Masters(model)
    assert len(list(masters)) == 1 and masters.of(model.bias) is model.bias
    assert model.bias.dtype == torch.bfloat16
