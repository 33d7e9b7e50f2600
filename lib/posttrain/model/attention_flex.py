"""The `flex` backend: FlexAttention over one sequence of all documents, masked by block."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

BLOCK = 128
"""Rows and columns of a block of the mask, FlexAttention's own default."""


def block_mask(starts: Tensor, window: int | None, queries: Tensor | None = None) -> Any:
    """A BlockMask for causal attention inside documents, within `window`, from the geometry of the documents.

    The first token that token q may see, lower(q), never falls from one q to the next, so its values at the
    ends of a block of queries say which blocks of keys are seen, and which wholly. No compiled search over
    all T^2 pairs, as create_block_mask makes it: minutes of compiling at T = 16,384, for every window size.

    Args:
        starts: [T] integer, where each token's document begins.
        queries: [Q] int64, ascending, the tokens that the mask has rows of; None for all.
    """
    length, device = len(starts), starts.device
    rows = torch.arange(length, device=device) if queries is None else queries
    lower = starts.long()[rows]
    lower = lower if window is None else torch.maximum(lower, rows - window + 1)
    begins = torch.arange(0, len(rows), BLOCK, device=device)
    ends = (begins + BLOCK - 1).clamp(max=len(rows) - 1)
    columns = torch.arange(0, length, BLOCK, device=device)[None, :]
    seen = (columns > lower[begins, None] - BLOCK) & (columns <= rows[ends, None])
    whole = (columns >= lower[ends, None]) & (columns + BLOCK - 1 <= rows[begins, None])

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv >= lower[q]) & (kv <= (q if queries is None else queries[q]))

    partly, wholly = _ordered(seen & ~whole), _ordered(whole)
    sizes = (len(rows), length)
    return BlockMask.from_kv_blocks(*partly, *wholly, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=sizes)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scale: float, sinks: Tensor | None) -> Tensor:
    """attend() by FlexAttention. It must run inside a compiled region on a GPU; uncompiled it is slow and exact.

    A sink takes the share sigmoid(sink - lse) of its softmax, and FlexAttention's lse carries gradient, so
    scaling the output by sigmoid(lse - sink) is the sink's own function and gradient.
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if sinks is None:
        out = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)
    else:
        request = AuxRequest(lse=True)
        out, extra = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=True, return_aux=request)
        keep = torch.sigmoid(extra.lse - sinks.float()[None, :, None])  # pyright: ignore[reportOptionalOperand]
        out = (out * keep[..., None]).to(q.dtype)
    return out[0].transpose(0, 1)  # pyright: ignore[reportIndexIssue]


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """A mask of blocks as BlockMask keeps it: how many columns of each row, and which, those first."""
    order = dense.int().argsort(dim=-1, descending=True, stable=True)
    return dense.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]
