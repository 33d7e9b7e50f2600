"""Which tokens of a pack each rank of a context group holds: a Batch becomes the same Batch with the rank's Share.

The pack is cut into 2n equal chunks, and rank r of n holds chunks r and 2n - 1 - r: one from the head, one from the
tail. A late token of a document has more to attend to than an early one; the pairs make the sums even.
"""

from dataclasses import replace

import torch
from torch import Tensor

from posttrain.data.types import Batch, Share


def chunks(tokens: int, *, rank: int, ranks: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where the two runs of tokens begin and end that a rank holds of a pack, in order."""
    size, rest = divmod(tokens, 2 * ranks)
    assert rest == 0, f"{tokens} tokens cannot be cut into {2 * ranks} equal chunks; the config refuses it"
    head, tail = rank * size, (2 * ranks - 1 - rank) * size
    return (head, head + size), (tail, tail + size)


def with_share(batch: Batch, *, rank: int, ranks: int) -> Batch:
    """The batch, on the CPU, with what `rank` of a context group computes of it; itself where there is one rank."""
    if ranks == 1:
        return batch
    held = chunks(len(batch.input_ids), rank=rank, ranks=ranks)
    token_idx = torch.cat([torch.arange(start, end) for start, end in held])
    at = torch.full_like(batch.input_ids, -1)
    at[token_idx] = torch.arange(len(token_idx))
    row_idx, row_at = _held(at[batch.loss_idx])
    last = batch.cu_seqlens[1 : batch.num_samples + 1].long() - 1
    sample_idx, sample_at = _held(at[last])
    share = Share(
        chunks=held,
        token_idx=token_idx,
        row_idx=row_idx,
        row_at=row_at,
        sample_idx=sample_idx,
        sample_at=sample_at,
    )
    return replace(batch, share=share)


def _held(at: Tensor) -> tuple[Tensor, Tensor]:
    """Which of some positions are held, and where; `at` is -1 for the others."""
    which = (at >= 0).nonzero()[:, 0]
    return which, at[which]
