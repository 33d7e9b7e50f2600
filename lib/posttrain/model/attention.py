"""Causal attention inside each document of a flat batch, and never across documents."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from posttrain.data.types import Batch
from posttrain.model.families import DecoderConfig
from posttrain.model.layers import Linear, RMSNorm, rotate


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentLayout:
    """Where each flat token sits when documents are laid out as rows; made once per batch."""

    rows: Tensor
    """[T] int64, document of each token."""
    columns: Tensor
    """[T] int64, position of each token in its document."""
    num_docs: int
    max_doc_len: int

    @staticmethod
    def of(batch: Batch) -> "DocumentLayout":
        return DocumentLayout(
            rows=batch.doc_id,
            columns=batch.position_ids,
            num_docs=len(batch.cu_seqlens) - 1,
            max_doc_len=batch.max_doc_len,
        )


def document_attention(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout) -> Tensor:
    """The `sdpa` backend: documents as rows [D, H, L, head_dim], causal, scattered back to [T, H, head_dim].

    Rows shorter than the longest end in zeros. Causality alone hides those from every
    real token, so no mask is built. Work and memory grow with D * L^2 and D * L: small
    for documents of like length, wasteful for one long among many short.
    """
    rows, columns = layout.rows, layout.columns

    def as_rows(x: Tensor) -> Tensor:
        padded = x.new_zeros(layout.num_docs, layout.max_doc_len, x.shape[1], x.shape[2])
        return padded.index_put((rows, columns), x).transpose(1, 2)

    out = F.scaled_dot_product_attention(as_rows(q), as_rows(k), as_rows(v), is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)[rows, columns]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and optional per-head qk-norm, over [T, hidden]."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden_size, config.num_heads * config.head_dim)
        self.k_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.v_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.o_proj = Linear(config.num_heads * config.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: DocumentLayout) -> Tensor:
        heads = (x.shape[0], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)), cos, sin)
        v = self.v_proj(x).view(heads)
        return self.o_proj(document_attention(q, k, v, layout).reshape(x.shape[0], -1))
