"""Float8 on a GPU: our kernel's casts are torch's own bits, and compiled products are the formula's."""

import pytest
import torch

from float8_formula import E4M3, E5M2, error, products
from posttrain.model.float8 import CAPABILITY, cast, tensorwise

able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= CAPABILITY
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not able, reason="needs a CUDA device of capability 8.9")]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def drawn(sizes, *, k=256, t=512):
    torch.manual_seed(0)
    x = (torch.randn(t, k, device="cuda") * 3).bfloat16().requires_grad_()
    weights = [(torch.randn(n, k, device="cuda") * 0.05).bfloat16().requires_grad_() for n in sizes]
    return x, weights, [torch.randn(t, n, device="cuda").bfloat16() * 1e-5 for n in sizes]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(("dim", "shapes"), [(0, [(48, 272), (400, 272)]), (1, [(272, 16), (272, 208), (272, 1040)])])
def test_the_kernel_casts_to_the_bits_that_torch_casts_to(dtype, dim, shapes):
    torch.manual_seed(0)
    parts = [torch.randn(shape, device="cuda").bfloat16() * 10**i for i, shape in enumerate(shapes)]
    parts[0][3, 5], parts[0][4, 6] = float("nan"), 0.0
    wide = torch.randn(shapes[-1][0], 2 * shapes[-1][1], device="cuda").bfloat16()
    parts[-1] = wide[:, shapes[-1][1] :]  # rows that lie apart
    scale = torch.tensor(2.0**-3, device="cuda")
    expected = (torch.cat(parts, dim).float() * scale).to(dtype)
    rows, columns = cast(parts, scale, dtype, dim=dim, layouts=(True, True))
    assert torch.equal(rows.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(columns.view(torch.uint8), expected.view(torch.uint8).t())
    assert rows.is_contiguous() and columns.is_contiguous()
    only = cast(parts, scale, dtype, dim=dim, layouts=(False, True))
    assert not only[0].numel() and torch.equal(only[1].view(torch.uint8), columns.view(torch.uint8))


@pytest.mark.parametrize("sizes", [(128,), (128, 64, 64)])
@pytest.mark.parametrize("compiled", [False, True])
def test_products_and_gradients_are_those_of_rounded_operands(sizes, compiled):
    x, weights, grads = drawn(sizes)
    outputs, dx, dws = products(x.detach(), [each.detach() for each in weights], grads)
    call = torch.compile(tensorwise, fullgraph=True, dynamic=False) if compiled else tensorwise
    got = call(x, weights)
    mine = torch.autograd.grad(got, [x, *weights], grads)
    for ours, theirs in zip((*got, *mine), (*outputs, dx, *dws), strict=True):
        assert error(ours, theirs) < 1e-2
    with torch.no_grad():
        assert all(error(ours, theirs) < 1e-2 for ours, theirs in zip(call(x, weights), outputs, strict=True))
