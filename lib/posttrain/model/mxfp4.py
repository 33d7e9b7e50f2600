"""MXFP4, as GPT-OSS publishes its experts: packed blocks and their scales become a dense tensor.

OCP Microscaling Formats (MX) v1.0, sections 5.3.3 and 6: 32 values of E2M1 share one E8M0 scale. Two
values lie in a byte, the earlier one in the low nibble.
"""

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 32
"""Values that share a scale."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXACT = (torch.bfloat16, torch.float32, torch.float64)  # hold every E2M1 value times every scale, subnormals included


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that packed blocks stand for, exact in bfloat16 and wider.

    Args:
        blocks: [..., G, 16] uint8.
        scales: [..., G] uint8, 2^(scale - 127); 255 is NaN.

    Returns:
        [..., G * 32] of `dtype`, where `blocks` is.
    """
    assert blocks.dtype == scales.dtype == torch.uint8 and blocks.shape == (*scales.shape, BLOCK // 2)
    exact = dtype if dtype in _EXACT else torch.float32
    pairs = _pairs(blocks.device, exact)[blocks.int()]  # [..., G, 16, 2]
    values = pairs.flatten(-2).mul_(_powers(scales).to(exact)[..., None])
    return values.flatten(-2).to(dtype)


def _powers(scales: Tensor) -> Tensor:
    """2^(scale - 127) as float32, put together from its bits: a power function may flush 2^-127 to zero."""
    exponent = scales.int()
    bits = exponent << 23
    bits = torch.where(exponent == 0, 1 << 22, bits)
    bits = torch.where(exponent == 255, 0x7FC00000, bits)
    return bits.view(torch.float32)


@lru_cache(maxsize=16)
def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[256, 2]: the two values of every byte."""
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=dtype)
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=-1).to(device)
