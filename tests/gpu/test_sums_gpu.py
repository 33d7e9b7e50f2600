"""Gradients gathered in float32 on a GPU: our kernel's sums are torch's own bits."""

import pytest
import torch

from posttrain.compute.sum_kernels import gather

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1,), (37,), (4097, 3), (1024, 2048)])
def test_sums_are_those_of_torch_to_the_bit(dtype, shape):
    torch.manual_seed(0)
    parts = [torch.randn(shape, device="cuda").to(dtype) * 10.0**-i for i in range(4)]
    total, expected = torch.full(shape, float("nan"), device="cuda"), parts[0].float()
    for i, part in enumerate(parts):
        gather(total, part, first=i == 0)
        expected = expected if i == 0 else expected + part
    assert torch.equal(total, expected)


def test_a_part_that_lies_otherwise_is_gathered_too():
    torch.manual_seed(0)
    part = torch.randn(64, 48, device="cuda").bfloat16().t()
    total = torch.zeros(48, 64, device="cuda")
    gather(total, part, first=False)
    assert torch.equal(total, part.float())
