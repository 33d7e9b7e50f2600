"""The `flex` backend: FlexAttention over one sequence of all documents, masked by block."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

BLOCK = 128
"""Rows and columns of a block of the mask, FlexAttention's own default."""


def block_mask(starts: Tensor, window: int | None) -> Any:
    """A BlockMask for causal attention inside documents, within `window`, from the geometry of the documents.

    The first token that token q may see, lower(q), never falls from one q to the next, so its values at the
    ends of a block of queries say which blocks of keys are seen, and which wholly. No compiled search over
    all T^2 pairs, as create_block_mask makes it: minutes of compiling at T = 16,384, for every window size.

    Args:
        starts: [T] integer, where each token's document begins.
    """
    length, device = len(starts), starts.device
    queries = torch.arange(length, device=device)
    lower = starts.long() if window is None else torch.maximum(starts.long(), queries - window + 1)
    count = -(-length // BLOCK)
    blocks = torch.arange(count, device=device)
    first = lower[blocks * BLOCK]
    last = lower[(blocks * BLOCK + BLOCK - 1).clamp(max=length - 1)]
    columns = blocks[None, :]
    seen = (columns >= (first // BLOCK)[:, None]) & (columns <= blocks[:, None])
    whole = (columns * BLOCK >= last[:, None]) & (columns < blocks[:, None])

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv >= lower[q]) & (kv <= q)

    partly, wholly = _ordered(seen & ~whole), _ordered(whole)
    return BlockMask.from_kv_blocks(*partly, *wholly, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length))


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
    """A [blocks, blocks] mask as BlockMask keeps it: how many columns of each row, and which, those first."""
    order = dense.int().argsort(dim=-1, descending=True, stable=True)
    return dense.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]
