"""A pack as tensors: documents end to end, positions restart, and only what carries loss is pointed at."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.batch import collate
from posttrain.data.sample import shift
from posttrain.data.types import Pack


def pack_of(*samples):
    return Pack(samples=samples, num_units=len(samples))


def two_samples():
    """Documents of 3 and 2 tokens, worked out by hand below."""
    one = shift([7, 8, 9, 2], [0, 0, 1, 0.5], sampler_logprobs=[0, 0, -0.25, -0.5], advantages=[0, 0, 2, 2])
    two = shift([5, 6, 3], [0, 1, 0], sampler_logprobs=[0, -0.75, 0], advantages=[0, -1, 0])
    return pack_of(one, two)


def test_a_batch_worked_out_by_hand():
    batch = collate(two_samples(), pack_tokens=9)
    assert batch.input_ids.tolist() == [7, 8, 9, 5, 6, 0, 0, 0, 0]
    assert batch.target_ids.tolist() == [8, 9, 2, 6, 3, 0, 0, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0]
    assert batch.doc_id.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8, 9]
    assert batch.loss_idx.tolist() == [1, 2, 3]
    assert batch.loss_mask.tolist() == [1, 0.5, 1]
    assert batch.sampler_logprobs.tolist() == [-0.25, -0.5, -0.75]
    assert batch.advantages.tolist() == [2, 2, -1]
    assert (batch.max_doc_len, batch.ref_logprobs) == (3, None)


def test_dtypes_are_those_of_the_batch_type():
    batch = collate(two_samples(), pack_tokens=9)
    whole = (batch.input_ids, batch.target_ids, batch.position_ids, batch.doc_id, batch.loss_idx)
    assert {column.dtype for column in whole} == {torch.int64}
    assert batch.cu_seqlens.dtype == torch.int32
    assert {column.dtype for column in (batch.loss_mask, batch.sampler_logprobs, batch.advantages)} == {torch.float32}


def test_a_full_pack_has_no_tail():
    batch = collate(two_samples(), pack_tokens=5)
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.input_ids.tolist() == [7, 8, 9, 5, 6]


def test_a_batch_without_rl_columns_has_none():
    batch = collate(pack_of(shift([1, 2], [0, 1])), pack_tokens=4)
    assert (batch.sampler_logprobs, batch.advantages) == (None, None)


def test_a_pack_that_does_not_fit_is_our_own_mistake():
    with pytest.raises(AssertionError, match="pack of 5 tokens exceeds pack_tokens=4"):
        collate(two_samples(), pack_tokens=4)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=5), st.integers(0, 30))
def test_a_batch_agrees_with_its_pack_and_pads_only_the_tail(masks, tail):
    samples, token = [], 1
    for mask in masks:
        ids = range(token, token + len(mask) + 1)
        samples.append(shift(ids, [0, *mask[:-1], 1], advantages=ids))
        token = ids.stop
    used = sum(map(len, samples))
    batch = collate(pack_of(*samples), pack_tokens=used + tail)

    assert {len(column) for column in (batch.input_ids, batch.target_ids, batch.position_ids, batch.doc_id)} == {
        used + tail
    }
    assert batch.input_ids[:used].tolist() == np.concatenate([s.input_ids for s in samples]).tolist()
    assert not batch.input_ids[used:].any() and not batch.target_ids[used:].any()
    assert batch.loss_idx.tolist() == sorted(set(batch.loss_idx.tolist())) and batch.loss_idx.max() < used
    assert batch.loss_mask.sum() == sum(s.loss_mask.sum() for s in samples)
    assert batch.advantages.tolist() == batch.target_ids[batch.loss_idx].tolist()

    lengths = batch.cu_seqlens.diff().tolist()
    assert lengths[: len(samples)] == [len(s) for s in samples]
    assert sum(lengths) == used + tail and min(lengths) > 0 and max(lengths) == batch.max_doc_len
    assert batch.max_doc_len == max(map(len, samples))
    assert batch.position_ids.tolist() == [position for n in lengths for position in range(n)]
    assert batch.doc_id.tolist() == [document for document, n in enumerate(lengths) for _ in range(n)]
