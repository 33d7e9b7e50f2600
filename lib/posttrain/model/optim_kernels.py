"""Triton kernel of optim.StochasticAdamW: what an update needs is read once and written once. Empty without Triton."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None  # a CPU build of torch does not bring it


def serves(*tensors: Tensor) -> bool:
    """Whether the kernel takes a weight, its gradient and its moments of these kinds."""
    return HAS_TRITON and all(x.is_cuda and x.dtype == torch.bfloat16 and x.is_contiguous() for x in tensors)


def update(
    tensors: Sequence[Tensor],
    step: Tensor,
    *,
    seed: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of AdamW in place, float32 inside, each result rounded by chance.

    Args:
        tensors: weight, gradient, mean and square, of one shape, that serve().
        step: float32 of no dimension on their device, this one counted.
        seed: of the draws; a number beyond 2^32.
    """
    kernel: Any = adamw  # subscripted: Triton's way to say how many programs
    count = tensors[0].numel()
    rates, logs = (lr, lr * weight_decay), (math.log2(max(beta, 1e-30)) for beta in betas)
    kernel[(triton.cdiv(count, BLOCK.value),)](*tensors, step, count, seed, *rates, *betas, *logs, eps)


if HAS_TRITON:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    BLOCK, ROUNDS = tl.constexpr(1024), tl.constexpr(7)
    """Elements a program; rounds of Philox, the fewest that pass all tests of randomness (Salmon et al., 2011)."""

    @triton.jit
    def rounded(value, draws):
        """float32 to one of the two nearest bfloat16 numbers, see optim.round_stochastically(); draws [0, 2^16)."""
        bits = (value.to(tl.int32, bitcast=True) + draws.to(tl.int32)) & -65536
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)

    @triton.jit(do_not_specialize=["seed"])
    def adamw(  # noqa: PLR0913 (a kernel has no other way to be told)
        weight, gradient, mean, square, step, count, seed, lr, decay,
        BETA1: tl.constexpr, BETA2: tl.constexpr, LOG1: tl.constexpr, LOG2: tl.constexpr, EPS: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        """Of `count` elements each, whose draws are a function of the seed and the place. LOG: log2 of a beta."""
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mean + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(square + at, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        taken = tl.load(step)
        m += (g - m) * (1 - BETA1)
        v = v * BETA2 + g * g * (1 - BETA2)
        scale = tl.sqrt(v / (1 - tl.exp2(taken * LOG2))) + EPS
        w = w * (1 - decay) - m / (1 - tl.exp2(taken * LOG1)) / scale * lr
        first, second, _, _ = tl.randint4x(seed, at.to(tl.int32), ROUNDS)
        tl.store(mean + at, rounded(m, first & 0xFFFF), mask=inside)
        tl.store(square + at, rounded(v, first >> 16), mask=inside)
        tl.store(weight + at, rounded(w, second & 0xFFFF), mask=inside)
