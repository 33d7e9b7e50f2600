"""Grouped-query attention inside each document of a flat batch, and the call behind which its kernels stand.

`Layout` says where documents lie, in the form that the chosen backend reads; it is made once a batch and
serves all layers. Backends:

    flex    FlexAttention with one BlockMask a window size (CUDA)
    varlen  the flash kernels of torch by document boundaries (CUDA, bfloat16 or float16)
    flash4  those of the package flash-attn-4, by the same boundaries (Hopper and Blackwell)
    sdpa    documents as rows of scaled_dot_product_attention; CPU, and the reference of the others
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.data.types import Batch
from posttrain.model.attention_flash import Segments, flash_attention, segments
from posttrain.model.attention_flash4 import has_flash4
from posttrain.model.attention_flex import block_mask, flex
from posttrain.model.attention_rows import rows_attention
from posttrain.model.collectives import Group, copy_in, local
from posttrain.model.context import gather_tokens
from posttrain.model.families import DecoderConfig
from posttrain.model.layers import Linear, RMSNorm, joint
from posttrain.model.rope import rotate
from posttrain.model.rotate_kernels import norm_and_rotate, serves

BACKENDS = ("flash4", "flex", "varlen", "sdpa")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each flat token's document begins and ends, as one backend reads it."""

    backend: str
    doc_id: Tensor
    """[T] int64."""
    position_ids: Tensor
    """[T] int64."""
    cu_seqlens: Tensor
    """[D+1] int32."""
    longest: Tensor
    """Tokens of the longest document, a scalar int64 on the CPU: as a number it would be a part of a compiled graph,
    and every new longest document would compile another."""
    masks: dict[int | None, Any] = field(default_factory=dict)
    """window -> BlockMask, for `flex`."""
    queries: Tensor | None = None
    """[T / n] int64, the tokens that this rank has queries of, where ranks share a pack; keys are always of all."""
    segments: tuple[Segments, ...] = ()
    """For `varlen` and `flash4`: runs of queries, and the keys that each may see."""

    @staticmethod
    def of(batch: Batch, *, backend: str, windows: set[int | None]) -> "Layout":
        """Read a batch once for all layers of a model with these window sizes."""
        masks, runs = {}, ()
        queries = None if batch.share is None else batch.share.token_idx
        if backend in ("varlen", "flash4"):
            held = ((0, len(batch.input_ids)),) if batch.share is None else batch.share.chunks
            runs = tuple(segments(batch.cu_seqlens, run) for run in held)
        if backend == "flex":
            starts = batch.cu_seqlens[batch.doc_id]
            masks = {window: block_mask(starts, window, queries) for window in windows}
        return Layout(
            backend=backend,
            doc_id=batch.doc_id,
            position_ids=batch.position_ids,
            cu_seqlens=batch.cu_seqlens,
            longest=torch.tensor(batch.max_doc_len, device="cpu"),
            masks=masks,
            queries=queries,
            segments=runs,
        )


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, window: int | None, scale: float, sinks: Tensor | None
) -> Tensor:
    """Causal attention within documents.

    Args:
        q: [T, H, head_dim], or of layout.queries alone; k, v: [T, H_kv, head_dim]; H is a multiple of H_kv.
        window: a token sees itself and window - 1 before it; None for the whole document.
        scale: on q k^T.
        sinks: [H] logits that join each softmax and carry no value (GPT-OSS), or None.

    Returns:
        What q is, in its shape and dtype.
    """
    if layout.backend == "flex":
        return flex(q, k, v, layout.masks[window], scale=scale, sinks=sinks)
    if layout.backend in ("varlen", "flash4"):
        how = {"window": window, "scale": scale, "sinks": sinks, "flash4": layout.backend == "flash4"}
        return flash_attention(q, k, v, layout.segments, layout.longest, **how)
    assert layout.backend == "sdpa", f"attention backend {layout.backend!r} is none of {BACKENDS}"
    rows = (layout.doc_id, layout.position_ids, len(layout.cu_seqlens) - 1, int(layout.longest))
    return rows_attention(q, k, v, rows, layout.queries, window=window, scale=scale, sinks=sinks)


def default_backend(device: torch.device, dtype: torch.dtype, *, compiled: bool) -> str:
    """The fastest backend that serves a model (benchmarks/decoder.py); FlexAttention is fast only when compiled."""
    if device.type != "cuda":
        return "sdpa"
    half = dtype in (torch.bfloat16, torch.float16)
    if half and has_flash4(device):
        return "flash4"
    if compiled:
        return "flex"
    return "varlen" if half else "sdpa"


def rotated(x: Tensor, norm: nn.Module, cos: Tensor, sins: Tensor) -> Tensor:
    """Heads [T, H, head_dim] as attention reads them: normed, where there is a norm, and turned to their positions."""
    if not serves(x):
        return rotate(norm(x), cos, sins)
    if not isinstance(norm, RMSNorm):
        return norm_and_rotate(x, None, cos, sins, eps=0.0, offset=0.0)
    weight = local(norm.weight, partial=norm.partial)
    return norm_and_rotate(x, weight, cos, sins, eps=norm.eps, offset=norm.offset)


class Attention(nn.Module):
    """Projections, optional per-head norms, rotary positions and attend(), over [T, hidden]."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.head_dim, self.scale, self.window = config.head_dim, config.attention_scale, config.windows[layer]
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=config.output_bias)
        norm = {"cast_first": config.norm_cast_first, "offset": config.norm_offset}
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, **norm) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, **norm) if config.qk_norm else nn.Identity()
        self.sinks = nn.Parameter(torch.empty(config.num_heads)) if config.sinks else None
        self.tensor: Group | None = None
        """Ranks that hold the other heads (model/parallel.py)."""
        self.context: Group | None = None
        """Ranks that hold the other tokens."""

    def forward(self, x: Tensor, cos: Tensor, sins: Tensor, layout: Layout) -> Tensor:
        heads = (x.shape[0], -1, self.head_dim)
        x = copy_in(x, self.tensor)
        q, k, v = (part.reshape(heads) for part in joint(x, (self.q_proj, self.k_proj, self.v_proj)))
        q, k = rotated(q, self.q_norm, cos, sins), rotated(k, self.k_norm, cos, sins)
        if self.context is not None:  # one message for both
            k, v = gather_tokens(torch.cat((k, v), dim=1), self.context).chunk(2, dim=1)
        sinks = None if self.sinks is None else local(self.sinks)
        out = attend(q, k, v, layout, window=self.window, scale=self.scale, sinks=sinks)
        return self.o_proj(out.reshape(x.shape[0], -1))
