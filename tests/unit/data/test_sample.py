"""The one causal shift: what stands at index t describes the token after input t."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.sample import shift
from posttrain.errors import DataError


def test_the_example_of_the_sample_type():
    sample = shift([7, 8, 9, 2], [0, 0, 1, 1])
    assert sample.input_ids.tolist() == [7, 8, 9]
    assert sample.target_ids.tolist() == [8, 9, 2]
    assert sample.loss_mask.tolist() == [0, 1, 1]
    assert (sample.sampler_logprobs, sample.advantages, len(sample)) == (None, None, 3)


def test_dtypes_are_those_of_the_sample_type():
    sample = shift([7, 8], [0, 1], advantages=[0, 1], sampler_logprobs=[0, -1])
    assert (sample.input_ids.dtype, sample.target_ids.dtype) == (np.int32, np.int32)
    columns = (sample.loss_mask, sample.advantages, sample.sampler_logprobs)
    assert [column.dtype for column in columns] == [np.float32] * 3


@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(0.5, 1, width=32), st.floats(width=32)), min_size=2))
def test_every_column_stands_with_the_token_it_describes(tokens):
    ids, weights, advantages = zip(*tokens, strict=True)
    sample = shift(ids, weights, advantages=advantages)
    targets = zip(sample.target_ids, sample.loss_mask, sample.advantages, strict=True)
    np.testing.assert_array_equal(np.array(list(targets), np.float64), np.array(tokens[1:], np.float64))
    assert sample.input_ids[1:].tolist() == sample.target_ids[:-1].tolist()


@pytest.mark.parametrize("name", ["loss_mask", "advantages", "sampler_logprobs"])
def test_a_column_of_another_length_is_refused_by_name(name):
    columns = {"loss_mask": [0, 1, 1], "advantages": [0, 1, 1], "sampler_logprobs": [0, 1, 1]}
    with pytest.raises(DataError, match=f"{name} has 2 entries for 3 tokens"):
        shift([1, 2, 3], **(columns | {name: [0, 1]}))


@pytest.mark.parametrize("mask", [[0, 0, 0], [1, 0, 0]], ids=["none", "only-the-first-which-nothing-predicts"])
@pytest.mark.fault("F34", outcome="REFUSE")
def test_a_sample_that_trains_nothing_is_refused(mask):
    with pytest.raises(DataError, match="no trained token among 3"):
        shift([1, 2, 3], mask)


@pytest.mark.parametrize("tokens", [[], [1]])
def test_a_sample_without_a_second_token_is_refused(tokens):
    with pytest.raises(DataError, match="no trained token"):
        shift(tokens, [1] * len(tokens))
