"""Heads normed and rotated by our kernels on a GPU: the formula's values and gradients, eager and compiled."""

import pytest
import torch

from posttrain.model.attention import rotated
from posttrain.model.layers import RMSNorm
from posttrain.model.rope import rotate
from posttrain.model.rotate_kernels import serves

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""On the largest difference, relative to the largest value; a bfloat16 value is known to 4e-3."""


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def norm_of(size, dtype, offset=0.0):
    norm = RMSNorm(size, 1e-6, cast_first=not offset, offset=offset).to("cuda", dtype)
    torch.nn.init.normal_(norm.weight)
    return norm


def wide(norm):
    """The norm in float64; of Identity, itself."""
    if not isinstance(norm, RMSNorm):
        return norm
    copy = RMSNorm(len(norm.weight), norm.eps, cast_first=False, offset=norm.offset)
    copy.weight = torch.nn.Parameter(norm.weight.detach().double())
    # The module's own formula casts to float32.
    copy.forward = lambda x: (copy.weight + norm.offset) * x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    return copy


def same(got, wanted, dtype):
    for ours, formula in zip(got, wanted, strict=True):
        assert ours.dtype == dtype and ours.shape == formula.shape
        assert (ours - formula).abs().max() <= BOUNDS[dtype] * formula.abs().max()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "normed", "offset"),
    [(4096, 16, 128, True, 0.0), (1003, 6, 64, True, 1.0), (517, 3, 256, True, 0.0), (999, 8, 128, False, 0.0)],
)
def test_heads_are_normed_and_turned_as_the_formula_says(dtype, compiled, tokens, heads, head_dim, normed, offset):
    torch.manual_seed(0)
    norm = norm_of(head_dim, dtype, offset) if normed else torch.nn.Identity()
    stacked = torch.randn(tokens, (heads + 2) * head_dim, device="cuda").to(dtype).requires_grad_()
    angles = torch.rand(tokens, 1, 1, head_dim // 2, device="cuda") * 6
    tables = angles.cos().to(dtype), torch.cat((-angles.sin(), angles.sin()), dim=-2).to(dtype)
    dy = torch.randn(tokens, heads, head_dim, device="cuda").to(dtype)

    def run(call, norm, x, tables, dy):
        y = call(x[:, head_dim:-head_dim].reshape(tokens, heads, head_dim), norm, *tables)
        return [y.detach(), *torch.autograd.grad(y, [x, *norm.parameters()], dy)]

    assert serves(stacked[:, :head_dim])
    call = torch.compile(rotated, fullgraph=True, dynamic=False) if compiled else rotated
    doubles = [each.double() for each in (*tables, dy)]
    wanted = run(
        lambda x, norm, *tables: rotate(norm(x), *tables),
        wide(norm),
        stacked.detach().double().requires_grad_(),
        doubles[:2],
        doubles[2],
    )
    same(run(call, norm, stacked, tables, dy), wanted, dtype)
