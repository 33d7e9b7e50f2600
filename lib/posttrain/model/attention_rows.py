"""The `sdpa` backend: documents laid out as rows. For CPUs, and the plain form that the fast backends are held to."""

import torch
from torch import Tensor
from torch.nn import functional as F


def rows_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: tuple[Tensor, Tensor, int, int],
    queries: Tensor | None = None,
    *,
    window: int | None,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    """attend() over documents as rows [D, H, L, head_dim], scattered back to [T, H, head_dim].

    Rows shorter than the longest end in zeros. Causality alone hides those from every real token. Work
    and memory grow with D * L^2 and D * L: small for documents of like length, wasteful for one long
    among many short.

    Args:
        rows: document of each token [T], its position in it [T], number of documents, longest document.
        queries: which tokens q has, where it has not all; the others' rows are zeros, computed and left out.
    """
    doc_id, position_ids, num_docs, longest = rows
    keys = (doc_id, position_ids)
    asked = keys if queries is None else (doc_id[queries], position_ids[queries])

    def as_rows(x: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
        padded = x.new_zeros(num_docs, longest, x.shape[1], x.shape[2])
        return padded.index_put(at, x).transpose(1, 2)

    visible = None if window is None or window >= longest else _band(longest, window, q.device)
    q, k, v = as_rows(q, asked), as_rows(k, keys), as_rows(v, keys)
    if sinks is None:
        causal = visible is None
        out = F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal, scale=scale, enable_gqa=True)
    else:
        visible = _band(longest, longest, q.device) if visible is None else visible
        out = _with_sinks(q, k, v, visible, scale=scale, sinks=sinks)
    return out.transpose(1, 2)[asked]


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[L, L] bool, True where query i may see key j: i - window < j <= i."""
    every = torch.ones(length, length, dtype=torch.bool, device=device)
    return every.tril() & every.triu(1 - window)


def _with_sinks(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float, sinks: Tensor) -> Tensor:
    """softmax over a row's scores and its head's sink, the sink's share dropped (transformers modeling_gpt_oss)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.mT * scale).masked_fill(~visible, float("-inf"))
    column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    share = torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1]
    return share @ v
