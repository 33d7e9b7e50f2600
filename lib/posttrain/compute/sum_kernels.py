"""Triton kernel that gathers gradients in float32. torch's own sum of two dtypes moves half the bytes a second."""

from importlib.util import find_spec
from typing import Any

from torch import Tensor

HAS_TRITON = find_spec("triton") is not None  # a CPU build of torch does not bring it


def serves(part: Tensor) -> bool:
    """Whether there is a kernel where this gradient lies."""
    return part.is_cuda and HAS_TRITON


def gather(total: Tensor, part: Tensor, *, first: bool) -> None:
    """total += part that serves(), to the bit as torch has it; total, float32, becomes part where that is the first."""
    if not (part.is_contiguous() and total.is_contiguous()):
        total.copy_(part) if first else total.add_(part)
        return
    kernel: Any = add  # subscripted: Triton's way to say how many programs
    kernel[(triton.cdiv(part.numel(), BLOCK.value),)](total, part, part.numel(), first)


if HAS_TRITON:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    BLOCK = tl.constexpr(4096)

    @triton.jit
    def add(total, part, count, FIRST: tl.constexpr):  # noqa: N803
        """total <- total + part [count], or <- part where it is the first."""
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        value = tl.load(part + at, mask=inside).to(tl.float32)
        if not FIRST:
            value += tl.load(total + at, mask=inside)
        tl.store(total + at, value, mask=inside)
