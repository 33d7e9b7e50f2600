"""The small modules: one stacked matmul is its linears, with biases and adapters."""

import pytest
import torch

from posttrain.model.layers import Linear, stacked


class Doubling(torch.nn.Module):
    """An adapter that changes its slice alone."""

    def forward(self, x, y, weight):
        return 2 * y


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adapted", [(), (1,), (0, 2)])
def test_a_stacked_matmul_and_its_gradients_are_those_of_its_linears(bias, adapted):
    torch.manual_seed(0)
    linears = [Linear(6, size, bias=bias).double() for size in (4, 2, 8)]
    for linear in linears:
        for parameter in linear.parameters():
            parameter.data.normal_()
    for number in adapted:
        linears[number].adapter = Doubling()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for linear in linears for p in linear.parameters())]
    expected, got = tuple(linear(x) for linear in linears), stacked(x, linears)
    upstream = [torch.randn_like(each) for each in expected]
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
