"""MXFP4 blocks decode to the values of the OCP specification, bit for bit."""

import math

import pytest
import torch

from posttrain.model.mxfp4 import dequantize


def random_blocks(*shape: int, lowest: int = 0, highest: int = 254) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(lowest, highest + 1, shape, generator=generator, dtype=torch.uint8)


def e2m1(code: int) -> float:
    """OCP MX v1.0, table 5: sign, two bits of exponent (bias 1), one of mantissa."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, (code >> 1) & 3, code & 1
    return sign * (mantissa * 0.5 if exponent == 0 else (1 + mantissa * 0.5) * 2.0 ** (exponent - 1))


def decoded(block: list[int], scale: int) -> list[float]:
    values = []
    for byte in block:
        values += [e2m1(byte & 15), e2m1(byte >> 4)]
    return [value * math.ldexp(1.0, scale - 127) for value in values]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_byte_and_every_scale_decode_as_the_specification_says(dtype: torch.dtype):
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 16)
    expected = [
        decoded(b.tolist(), s)
        for row, each in zip(blocks, scales.tolist(), strict=True)
        for b, s in zip(row, each, strict=True)
    ]
    found = dequantize(blocks, scales, dtype)
    assert found.dtype == dtype and found.shape == (255, 16 * 32)
    wanted = torch.tensor(expected, dtype=torch.float64).view(255, 512)
    in_range = wanted.abs() <= torch.finfo(dtype).max
    assert torch.equal(found.double()[in_range], wanted[in_range])
    assert found.double()[~in_range].isinf().all() and (~in_range).sum() in (
        0,
        384,
    )  # 2, 3, 4, 6 x 2^127 and 4, 6 x 2^126
    assert torch.equal(torch.signbit(found), torch.signbit(wanted))  # minus zero stays


def test_scale_255_is_not_a_number():
    blocks, scales = random_blocks(2, 3)
    scales[1, 2] = 255
    assert dequantize(blocks, scales, torch.float32).isnan().nonzero().tolist() == [[1, i] for i in range(64, 96)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_equal_transformers(dtype: torch.dtype):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_blocks(3, 8, 5, lowest=80, highest=160)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert torch.equal(dequantize(blocks, scales, dtype), theirs.mT)


def test_a_narrow_dtype_is_rounded_once():
    blocks, scales = random_blocks(4, lowest=100, highest=150)
    wanted = torch.tensor([decoded(b, s) for b, s in zip(blocks.tolist(), scales.tolist(), strict=True)])
    assert torch.equal(dequantize(blocks, scales, torch.float16), wanted.flatten().half())
