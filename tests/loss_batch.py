"""A Batch of nothing but loss rows: what a loss of tokens reads."""

import torch
from torch import Tensor

from posttrain.data.types import Batch


def loss_batch(mask: Tensor, **columns: Tensor) -> Batch:
    """A Batch whose loss positions are all there is, [N]; only what losses read matters."""
    n = len(mask)
    zeros = torch.zeros(n, dtype=torch.int64)
    return Batch(
        input_ids=zeros,
        target_ids=zeros,
        position_ids=zeros,
        doc_id=zeros,
        cu_seqlens=torch.tensor([0, n], dtype=torch.int32),
        loss_idx=torch.arange(n),
        loss_mask=mask,
        max_doc_len=n,
        **columns,
    )
