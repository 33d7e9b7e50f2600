"""The `varlen` backend: torch's own flash kernels, told where documents begin, with exact sinks.

The kernels know no sinks, and torch's autograd for them drops the gradient of lse, so the usual way,
out * sigmoid(lse - sink), trains on a wrong dq and dk. Here the sink is folded into what the ordinary
backward kernel reads: with lse' = logaddexp(lse, sink) and out' = out * exp(lse - lse'), the kernel's own
formulas (FlashAttention-2, arXiv:2307.08691, algorithm 2), given out' and lse', yield the exact dq, dk and
dv of the softmax with the sink, and dsink = -sum exp(sink - lse') * rowsum(dout * out').
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.model.attention_flash4 import bounds, flash4_backward, flash4_forward


@dataclass(frozen=True, slots=True)
class Segments:
    """A run of a pack's tokens as queries, and the keys that each document's may see."""

    cu_queries: Tensor
    """[D+1] int32, where each document's queries begin in the run; a document outside it has none."""
    cu_keys: Tensor
    """[D+1] int32, where each document's keys begin in the pack; the run's last query sees the last of them."""
    queries: int
    """Tokens of the run."""
    keys: int
    """Tokens of the pack from its beginning to the run's end; no later key is seen."""


def segments(cu_seqlens: Tensor, run: tuple[int, int]) -> Segments:
    """The Segments of the tokens from run[0] to run[1] of a pack.

    The kernel aligns a document's causal mask at the end of its keys, so they are cut where the run ends.
    """
    start, end = run
    bounds = cu_seqlens.clamp(start, end) - start, cu_seqlens.clamp(max=end)
    for each in bounds:
        torch._dynamo.maybe_mark_dynamic(each, 0)  # one graph for any number of documents
    return Segments(*bounds, queries=end - start, keys=end)


def flash_attention(  # noqa: PLR0913 (what the kernel takes)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: Sequence[Segments],
    longest: Tensor,
    *,
    window: int | None,
    scale: float,
    sinks: Tensor | None,
    flash4: bool = False,
) -> Tensor:
    """attend() by document boundaries, [T, H, head_dim] bfloat16 or float16 on CUDA.

    Args:
        runs: of the queries, in order; k and v are of the whole pack.
        longest: at least the longest document, tokens; a scalar on the CPU.
        flash4: by the kernels of attention_flash4.py, not torch's.
    """
    left = -1 if window is None else window - 1
    sinks32 = None if sinks is None else sinks.float()
    found = []
    for run, part in zip(runs, q.split([run.queries for run in runs]), strict=True):
        keys = (k[: run.keys], v[: run.keys])
        found.append(_flash(part, *keys, run.cu_queries, run.cu_keys, longest, sinks32, left, scale, flash4)[0])
    return found[0] if len(found) == 1 else torch.cat(found)


@torch.library.custom_op("posttrain::flash_attention", mutates_args=())
def _flash(  # noqa: PLR0913 (what the kernel takes)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest: Tensor,
    sinks: Tensor | None,
    left: int,
    scale: float,
    flash4: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [T, H, head_dim], lse [H, T] float32 with the sink in it, and the kernel's random state, unused."""
    window, max_len = {"window_size_left": left, "window_size_right": 0}, int(longest)
    if flash4:
        documents = bounds(cu_q, cu_k, max_len)
        out, lse = flash4_forward(q, k, v, documents, left=left, scale=scale)
        state = torch.empty((2,), dtype=torch.uint64, device=q.device)
    else:
        out, lse, state, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_q, cu_k, max_len, max_len, 0.0, True, return_debug_mask=False, scale=scale, **window
        )
    if sinks is not None:
        with_sink = torch.logaddexp(lse, sinks[:, None])
        out = (out * (lse - with_sink).exp().T[..., None]).to(out.dtype)
        lse = with_sink
    return out, lse, state


@_flash.register_fake
def _(q, k, v, cu_q, cu_k, longest, sinks, left, scale, flash4):  # noqa: PLR0913
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return torch.empty_like(q), lse, torch.empty((2,), dtype=torch.uint64, device=q.device)


@torch.library.custom_op("posttrain::flash_attention_backward", mutates_args=())
def _flash_backward(  # noqa: PLR0913 (what the kernel takes)
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest: Tensor,
    state: Tensor,
    left: int,
    scale: float,
    flash4: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    window, max_len = {"window_size_left": left, "window_size_right": 0}, int(longest)
    if flash4:
        documents = bounds(cu_q, cu_k, max_len)
        return flash4_backward(grad, q, k, v, out, lse, documents, left=left, scale=scale)
    unused = q.new_empty(0)
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, cu_q, cu_k, max_len, max_len, 0.0, True, state, unused, scale=scale, **window
    )


@_flash_backward.register_fake
def _(grad, q, k, v, out, lse, cu_q, cu_k, longest, state, left, scale, flash4):  # noqa: PLR0913
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output):
    q, k, v, cu_q, cu_k, longest, sinks, ctx.left, ctx.scale, ctx.flash4 = inputs
    out, lse, state = output
    ctx.save_for_backward(q, k, v, cu_q, cu_k, longest, sinks, out, lse, state)
    ctx.mark_non_differentiable(lse, state)


def _gradients(ctx, grad, *_):
    q, k, v, cu_q, cu_k, longest, sinks, out, lse, state = ctx.saved_tensors
    grad = grad.contiguous()
    rest = (longest, state, ctx.left, ctx.scale, ctx.flash4)
    dq, dk, dv = _flash_backward(grad, q, k, v, out, lse, cu_q, cu_k, *rest)
    dsinks = None
    if sinks is not None:
        rowsum = (grad.float() * out.float()).sum(-1)
        dsinks = -((sinks[:, None] - lse).exp().T * rowsum).sum(0)
    return dq, dk, dv, None, None, None, dsinks, None, None, None


_flash.register_autograd(_gradients, setup_context=_save)
