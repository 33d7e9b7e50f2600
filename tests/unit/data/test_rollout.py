"""Seeds that depend on the request alone, and groups of rollouts as units to train on."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.rollout import group_units, request_seed
from posttrain.data.types import Prompt, Rollout

PART = st.integers(0, 2**40)
REQUEST = st.tuples(PART, PART, PART, PART)


def rollout(index, token_ids, logprobs):
    prompt = Prompt(uid=3, token_ids=(7, 8), row={"answer": "9"})
    return Rollout(
        prompt=prompt,
        sample_index=index,
        token_ids=token_ids,
        logprobs=logprobs,
        versions=(4,) * len(token_ids),
        finish_reason="stop",
    )


@given(st.sets(REQUEST, min_size=2, max_size=20))
def test_requests_that_differ_in_any_part_have_different_seeds(requests):
    assert len({request_seed(*request) for request in requests}) == len(requests)


@pytest.mark.parametrize("part", range(4))
def test_a_seed_depends_on_each_part_of_the_request(part):
    request = [1, 11, 1, 11]
    changed = [value + (index == part) for index, value in enumerate(request)]
    assert request_seed(*request) != request_seed(*changed)


def test_parts_are_kept_apart():
    assert len({request_seed(1, 23, 4, 5), request_seed(12, 3, 4, 5), request_seed(1, 2, 34, 5)}) == 3


@given(REQUEST)
def test_a_seed_is_sixty_four_bits(request_):
    assert 0 <= request_seed(*request_) < 2**64


def test_a_seed_is_the_same_in_every_version():
    expected = int(hashlib.sha256(b"1/2/3/4").hexdigest()[:16], 16)
    assert request_seed(1, 2, 3, 4) == expected


def test_a_group_worked_out_by_hand():
    group = [rollout(0, (9, 2), (-0.5, -0.25)), rollout(1, (2,), (-1.5,))]
    (long,), (short,) = group_units(group, [0.75, -0.75])
    assert long.input_ids.tolist() == [7, 8, 9]
    assert long.target_ids.tolist() == [8, 9, 2]
    assert long.loss_mask.tolist() == [0, 1, 1]
    assert long.sampler_logprobs.tolist() == [0, -0.5, -0.25]
    assert long.advantages.tolist() == [0, 0.75, 0.75]
    assert (short.input_ids.tolist(), short.target_ids.tolist()) == ([7, 8], [8, 2])
    assert (short.loss_mask.tolist(), short.sampler_logprobs.tolist()) == ([0, 1], [0, -1.5])
    assert short.advantages.tolist() == [0, -0.75]


def test_a_completion_may_weigh_one_in_all():
    group = [rollout(0, (9, 2), (-0.5, -0.25)), rollout(1, (2,), (-1.5,))]
    (long,), (short,) = group_units(group, [0.75, -0.75], by_sequence=True)
    assert long.loss_mask.tolist() == [0, 0.5, 0.5] and short.loss_mask.tolist() == [0, 1]


def test_every_rollout_needs_its_advantage():
    with pytest.raises(ValueError, match="shorter"):
        group_units([rollout(0, (9, 2), (-0.5, -0.25)), rollout(1, (2,), (-1.5,))], [0.75])
