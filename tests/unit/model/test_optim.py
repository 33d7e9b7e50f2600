"""AdamW without float32 weights: stochastic rounding is right on average, and the update is AdamW's."""

import pytest
import torch
from torch import nn

from posttrain.model.optim import StochasticAdamW, adamw, round_stochastically

NUMBERS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def test_rounding_is_right_on_average_and_goes_to_a_neighbour():
    value = torch.full((100_000,), 1 + 2**-7 / 4)  # a quarter of the way from 1 to the next bfloat16
    rounded = torch.empty(100_000, dtype=torch.bfloat16)
    round_stochastically(value.clone(), rounded, torch.Generator().manual_seed(0))
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    share = (rounded > 1).float().mean().item()
    assert share == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 100_000) ** 0.5)


@pytest.mark.parametrize("number", [0.0, -0.0, 1.0, -3.5, 2.0**-130])
def test_a_bfloat16_number_stays_what_it_is(number):
    rounded = torch.empty(1000, dtype=torch.bfloat16)
    round_stochastically(torch.full((1000,), number), rounded, torch.Generator().manual_seed(0))
    assert torch.equal(rounded, torch.full((1000,), number, dtype=torch.bfloat16))


def test_in_float32_the_update_is_torchs_adamw():
    torch.manual_seed(0)
    ours, theirs = (nn.ParameterList([nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4))]) for _ in range(2))
    optimizers = adamw(ours, **NUMBERS, stochastic=True), adamw(theirs, **NUMBERS)
    for _ in range(5):
        for one, two in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            two.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


def test_updates_below_a_bfloat16_are_not_lost():
    """A gradient of one sign moves each weight by lr a step: after 100 steps by 100 lr, in all, within the draws."""
    weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = StochasticAdamW([{"params": [weight]}], lr=1e-5, betas=(0.9, 0.95))
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(1 - 100e-5, abs=1e-4)
    nearest = torch.ones((), dtype=torch.bfloat16)
    assert nearest - 1e-5 == nearest, "rounded to nearest, no step would have moved it"
