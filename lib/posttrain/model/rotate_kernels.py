"""Triton kernels of a head's way to attention: RMSNorm and rotation in one read, and their gradient in another.

The compiler makes four kernels of the gradient, each of which reads the heads anew (docs/performance.md). The
operation is defined only where Triton is; norm_and_rotate() says where it serves.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HAS_TRITON = find_spec("triton") is not None  # a CPU build of torch does not bring it


def serves(x: Tensor) -> bool:
    """Whether the kernels take heads [T, H, head_dim] of this kind."""
    half = x.shape[-1] // 2
    return x.is_cuda and x.dtype in DTYPES and half >= 16 and half & (half - 1) == 0 and HAS_TRITON


def norm_and_rotate(
    x: Tensor, weight: Tensor | None, cos: Tensor, sins: Tensor, *, eps: float, offset: float
) -> Tensor:
    """rope.rotate() of layers.RMSNorm's output, float32 between, for an x that serves().

    Args:
        x: [T, H, head_dim]; tokens may lie apart, as those of a slice of a larger matrix do.
        weight: [head_dim] of the norm; None rotates alone.
        cos, sins: of rope_tables(), contiguous.

    Returns:
        [T, H, head_dim], contiguous, in the dtype of x.
    """
    return torch.ops.posttrain.norm_rotate(x, weight, cos, sins, eps, offset)


if HAS_TRITON:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    TOKENS = tl.constexpr(16)
    """Of one program: eight bfloat16 a thread and half a head."""

    def programs(x: Tensor) -> tuple[tuple[int, int], int]:
        """Those of a launch over [T, H, head_dim], and the heads that each takes one after the other."""
        tokens, heads = x.shape[:2]
        each = next(count for count in (4, 2, 1) if heads % count == 0)
        return (triton.cdiv(tokens, TOKENS.value), heads // each), each

    @triton.jit
    def shared_by_heads(cos, sins, weight, t, j, inside, HALF: tl.constexpr, OFFSET: tl.constexpr):  # noqa: N803
        """cos and sin [TOKENS, HALF] of rope_tables(), and the weight's halves [1, HALF], as float32."""
        c = tl.load(cos + t * HALF + j, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sins + (2 * t + 1) * HALF + j, mask=inside, other=0.0).to(tl.float32)
        w1 = tl.load(weight + j).to(tl.float32) + OFFSET
        return c, s, w1, tl.load(weight + HALF + j).to(tl.float32) + OFFSET

    @triton.jit
    def mean(first, second, HALF: tl.constexpr):  # noqa: N803
        """Of the two halves [TOKENS, HALF] of a head: [TOKENS]."""
        return (tl.sum(first, axis=1) + tl.sum(second, axis=1)) / (2 * HALF)

    @triton.jit
    def halves(x, t, j, head, stride, inside, HALF: tl.constexpr):  # noqa: N803
        """Both halves [TOKENS, HALF] of a head as float32."""
        where = x + t * stride + head * 2 * HALF + j
        first = tl.load(where, mask=inside, other=0.0).to(tl.float32)
        return first, tl.load(where + HALF, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def rotate_heads(  # noqa: PLR0913 (a kernel has no other way to be told)
        x, weight, cos, sins, y, tokens, x_stride, heads,
        EACH: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        """x [tokens, heads, 2 HALF] -> y, its heads normed, if NORM, and turned; EACH heads a program. Without
        NORM the weight is any 2 HALF elements."""
        t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
        j = tl.arange(0, HALF)[None, :]
        inside = (t < tokens) & (j < HALF)
        c, s, w1, w2 = shared_by_heads(cos, sins, weight, t, j, inside, HALF, OFFSET)
        for i in range(EACH):
            head = tl.program_id(1) * EACH + i
            x1, x2 = halves(x, t, j, head, x_stride, inside, HALF)
            if NORM:
                r = tl.rsqrt(mean(x1 * x1, x2 * x2, HALF) + EPS)[:, None]
                x1, x2 = x1 * r * w1, x2 * r * w2
            where = y + (t * heads + head) * 2 * HALF + j
            tl.store(where, (x1 * c - x2 * s).to(y.dtype.element_ty), mask=inside)
            tl.store(where + HALF, (x2 * c + x1 * s).to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def rotate_heads_gradient(  # noqa: PLR0913
        dy, x, weight, cos, sins, dx, dw, tokens, dy_stride, x_stride, heads,
        EACH: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        """dy -> dx [tokens, heads, 2 HALF], and the weight's gradient of each program, dw [programs, 2 HALF]."""
        t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
        j = tl.arange(0, HALF)[None, :]
        inside = (t < tokens) & (j < HALF)
        c, s, w1, w2 = shared_by_heads(cos, sins, weight, t, j, inside, HALF, OFFSET)
        dw1, dw2 = tl.zeros((TOKENS, HALF), tl.float32), tl.zeros((TOKENS, HALF), tl.float32)
        for i in range(EACH):
            head = tl.program_id(1) * EACH + i
            d1, d2 = halves(dy, t, j, head, dy_stride, inside, HALF)
            d1, d2 = d1 * c + d2 * s, d2 * c - d1 * s
            if NORM:
                x1, x2 = halves(x, t, j, head, x_stride, inside, HALF)
                r = tl.rsqrt(mean(x1 * x1, x2 * x2, HALF) + EPS)[:, None]
                x1, x2 = x1 * r, x2 * r
                dw1 += d1 * x1
                dw2 += d2 * x2
                d1, d2 = d1 * w1, d2 * w2
                along = mean(d1 * x1, d2 * x2, HALF)[:, None]
                d1, d2 = r * (d1 - x1 * along), r * (d2 - x2 * along)
            where = dx + (t * heads + head) * 2 * HALF + j
            tl.store(where, d1.to(dx.dtype.element_ty), mask=inside)
            tl.store(where + HALF, d2.to(dx.dtype.element_ty), mask=inside)
        if NORM:
            where = dw + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 2 * HALF + j
            tl.store(where, tl.sum(dw1, axis=0)[None, :])
            tl.store(where + HALF, tl.sum(dw2, axis=0)[None, :])

    def packed(x: Tensor) -> Tensor:
        """x, its heads beside each other in each token."""
        return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()

    @torch.library.triton_op("posttrain::norm_rotate", mutates_args=())
    def norm_rotate(x: Tensor, weight: Tensor | None, cos: Tensor, sins: Tensor, eps: float, offset: float) -> Tensor:
        """See norm_and_rotate()."""
        kernel: Any = torch.library.wrap_triton(rotate_heads)
        x, y = packed(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        (tokens, heads, head_dim), (grid, each) = x.shape, programs(x)
        norm = weight is not None
        kernel[grid](
            x, weight if norm else x, cos, sins, y, tokens, x.stride(0), heads, each, head_dim // 2, norm, eps, offset
        )
        return y

    @torch.library.triton_op("posttrain::norm_rotate_gradient", mutates_args=())
    def norm_rotate_gradient(
        dy: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor, sins: Tensor, eps: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the weight, which is empty where there is none."""
        kernel: Any = torch.library.wrap_triton(rotate_heads_gradient)
        dy, x, dx = packed(dy), packed(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        (tokens, heads, head_dim), (grid, each) = x.shape, programs(x)
        norm = weight is not None
        dw = torch.empty((grid[0] * grid[1] if norm else 0, head_dim), dtype=torch.float32, device=x.device)
        kernel[grid](
            dy, x, weight if norm else x, cos, sins, dx, dw, tokens, dy.stride(0), x.stride(0), heads,
            each, head_dim // 2, norm, eps, offset,
        )  # fmt: skip
        return dx, dw.sum(0).to(weight.dtype) if norm else dw

    def keep(ctx, inputs, output) -> None:
        x, weight, cos, sins, ctx.eps, ctx.offset = inputs
        ctx.save_for_backward(x, weight, cos, sins)

    def gradient(ctx, dy: Tensor):
        x, weight, cos, sins = ctx.saved_tensors
        dx, dw = norm_rotate_gradient(dy, x, weight, cos, sins, ctx.eps, ctx.offset)
        return dx, None if weight is None else dw, None, None, None, None

    torch.library.register_autograd("posttrain::norm_rotate", gradient, setup_context=keep)
