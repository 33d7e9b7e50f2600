"""The products of model/float8.py in float64 on values rounded to float8: what both its paths are tested against."""

import math

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in float64 after it was scaled by the power of two that just keeps it in range, rounded, and scaled back."""
    mantissa, exponent = math.frexp(torch.finfo(dtype).max / float(x.abs().max()))
    assert 0.5 <= mantissa < 1
    scale = 2.0 ** (exponent - 1)
    return (x.float() * scale).to(dtype).double() / scale


def products(x, weights, grads):
    """(outputs, gradient of x, gradients of the weights) of one tensor-wise scale for x, the weights and the grads."""
    weight, grad = torch.cat(list(weights)), torch.cat(list(grads), 1)
    x8, w8, g8 = rounded(x, E4M3), rounded(weight, E4M3), rounded(grad, E5M2)
    sizes = [len(each) for each in weights]
    return (x8 @ w8.T).split(sizes, 1), g8 @ w8, (g8.T @ x8).split(sizes)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the expected norm."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    return float((got - expected).norm() / expected.norm())
