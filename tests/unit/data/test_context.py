"""Which tokens of a pack a rank of a context group has."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.batch import collate
from posttrain.data.context import chunks, with_share
from posttrain.data.sample import shift
from posttrain.data.types import Batch, Pack

TOKENS = 48


def batch_of(lengths: list[int], trained: float) -> Batch:
    rng = np.random.default_rng(sum(lengths))
    masks = [[*(rng.random(n) < trained), True] for n in lengths]
    samples = tuple(shift(np.arange(n + 1), np.array(mask, float)) for n, mask in zip(lengths, masks, strict=True))
    return collate(Pack(samples=samples, num_units=len(samples)), pack_tokens=TOKENS)


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    trained=st.sampled_from([0.0, 0.3, 1.0]),
    ranks=st.sampled_from([2, 3, 4, 24]),
)
def test_every_token_loss_row_and_last_token_is_one_ranks(lengths, trained, ranks):
    batch = batch_of(lengths, trained)
    shares = [with_share(batch, rank=rank, ranks=ranks).share for rank in range(ranks)]
    for name, count in (("token_idx", TOKENS), ("row_idx", len(batch.loss_idx)), ("sample_idx", len(lengths))):
        every = torch.cat([getattr(share, name) for share in shares])
        assert sorted(every.tolist()) == list(range(count))
    last = batch.cu_seqlens[1 : len(lengths) + 1].long() - 1
    for share in shares:
        assert share.token_idx.tolist() == [token for start, end in share.chunks for token in range(start, end)]
        assert torch.equal(share.token_idx[share.row_at], batch.loss_idx[share.row_idx])
        assert torch.equal(share.token_idx[share.sample_at], last[share.sample_idx])


def test_ranks_have_as_many_pairs_of_a_document_that_fills_the_pack():
    """A token at t attends to t + 1."""
    work = [
        sum(token + 1 for start, end in chunks(TOKENS, rank=rank, ranks=4) for token in range(start, end))
        for rank in range(4)
    ]
    assert len(set(work)) == 1 and sum(work) == TOKENS * (TOKENS + 1) // 2


def test_one_rank_has_no_share_and_all_columns_move_together():
    batch = batch_of([9, 5], 1.0)
    assert with_share(batch, rank=0, ranks=1) is batch
    moved = with_share(batch, rank=1, ranks=2).to("meta")
    assert moved.input_ids.is_meta and moved.share.token_idx.is_meta and moved.share.row_at.is_meta
