"""StochasticAdamW's kernel on a GPU: AdamW's update, each number rounded to a neighbour and right on average."""

import pytest
import torch
from torch import nn

from posttrain.model import optim_kernels
from posttrain.model.optim import StochasticAdamW

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BETAS, LR, DECAY, EPS = (0.9, 0.95), 1e-3, 0.1, 1e-8


def drawn(count):
    torch.manual_seed(0)
    weight, gradient, mean = (torch.randn(count, device="cuda").bfloat16() * scale for scale in (1, 0.1, 0.1))
    return weight, gradient, mean, torch.rand(count, device="cuda").bfloat16() * 0.01


def updated(tensors, seed):
    copies = tuple(each.clone() for each in tensors)
    assert optim_kernels.serves(*copies)
    step = torch.tensor(3.0, device="cuda")
    optim_kernels.update(copies, step, seed=seed, lr=LR, weight_decay=DECAY, betas=BETAS, eps=EPS)
    return copies


def test_every_number_is_a_neighbour_of_the_formulas_and_right_on_average():
    count = 1_000_003
    tensors = drawn(count)
    weight, gradient, mean, square = (each.double() for each in tensors)
    mean = mean.lerp(gradient, 1 - BETAS[0])
    square = square * BETAS[1] + gradient**2 * (1 - BETAS[1])
    scale = (square / (1 - BETAS[1] ** 3)).sqrt() + EPS
    weight = weight * (1 - LR * DECAY) - mean / (1 - BETAS[0] ** 3) / scale * LR
    got = updated(tensors, (4 << 32) + 7)
    assert torch.equal(got[1], tensors[1])
    for ours, exact in ((got[0], weight), (got[2], mean), (got[3], square)):
        units = (ours.double() - exact) / 2.0 ** (exact.abs().log2().floor() - 7)
        assert units.abs().max() < 1.001
        assert units.mean().abs() < 5 * units.std() / count**0.5


def test_draws_are_of_the_seed():
    tensors = drawn(4099)
    first, again, step, place = (updated(tensors, (at << 32) + index) for at, index in ((4, 7), (4, 7), (5, 7), (4, 8)))
    for i in (0, 2, 3):
        assert torch.equal(first[i], again[i])
        assert not torch.equal(first[i], step[i]) and not torch.equal(first[i], place[i])


def test_updates_below_a_bfloat16_are_not_lost():
    weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16, device="cuda"))
    optimizer = StochasticAdamW([{"params": [weight]}], lr=1e-5, betas=BETAS)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(1 - 100e-5, abs=1e-4)
