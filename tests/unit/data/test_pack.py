"""Packing loses, repeats and splits nothing; dealing gives every rank its fair share."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.pack import deal, pack
from posttrain.data.sample import shift
from posttrain.errors import DataError

T = 32
LENGTHS = st.lists(st.lists(st.integers(1, T // 2), min_size=1, max_size=2), min_size=1, max_size=40)
"""Units of one sample, or of two that must stay together."""


def unit(index, lengths):
    """Samples that can be told apart: every token of sample s of unit i is 2 i + s."""
    return tuple(shift([2 * index + s] * (n + 1), [1.0] * (n + 1)) for s, n in enumerate(lengths))


def units_of(lengths):
    return [unit(index, of_unit) for index, of_unit in enumerate(lengths)]


def names(packed):
    """(unit, place in unit, length) of every sample of a pack."""
    return [(int(s.input_ids[0]) // 2, int(s.input_ids[0]) % 2, len(s)) for s in packed.samples]


@given(LENGTHS)
def test_packing_loses_and_repeats_no_sample(lengths):
    packs = pack(units_of(lengths), pack_tokens=T)
    given_ = [(i, s, n) for i, of_unit in enumerate(lengths) for s, n in enumerate(of_unit)]
    assert sorted(name for packed in packs for name in names(packed)) == given_
    assert sum(packed.num_units for packed in packs) == len(lengths)


@given(LENGTHS)
def test_no_pack_is_longer_than_t(lengths):
    for packed in pack(units_of(lengths), pack_tokens=T):
        assert 0 < packed.num_tokens == sum(n for *_, n in names(packed)) <= T


@given(LENGTHS)
def test_packing_never_splits_a_pair(lengths):
    for packed in pack(units_of(lengths), pack_tokens=T):
        found = names(packed)
        whole = [(i, s, n) for i in dict.fromkeys(i for i, *_ in found) for s, n in enumerate(lengths[i])]
        assert found == whole
        assert packed.num_units == len({i for i, *_ in found})


@given(LENGTHS)
def test_units_of_a_pack_keep_their_order(lengths):
    for packed in pack(units_of(lengths), pack_tokens=T):
        indices = [i for i, *_ in names(packed)]
        assert indices == sorted(indices)


@given(LENGTHS)
def test_packing_is_deterministic(lengths):
    one, other = (pack(units_of(lengths), pack_tokens=T) for _ in range(2))
    assert [names(packed) for packed in one] == [names(packed) for packed in other]


@given(LENGTHS)
def test_no_two_packs_could_have_been_one(lengths):
    loads = sorted(packed.num_tokens for packed in pack(units_of(lengths), pack_tokens=T))
    assert len(loads) == 1 or loads[0] + loads[1] > T


def test_a_unit_goes_into_the_fullest_pack_that_takes_it():
    packs = pack(units_of([[10], [7], [6], [2]]), pack_tokens=12)  # 7 | 10: the 2 fits both, 10 is fuller
    assert [[n for *_, n in names(packed)] for packed in packs] == [[10, 2], [7], [6]]


def test_a_unit_of_exactly_t_tokens_is_a_pack():
    (packed,) = pack(units_of([[T // 2, T // 2]]), pack_tokens=T)
    assert packed.num_tokens == T


def test_a_unit_longer_than_a_pack_is_refused_with_its_length():
    with pytest.raises(DataError, match=r"unit 1 has 33 tokens and a pack holds 32; raise data\.pack_tokens to .* 33"):
        pack(units_of([[3], [17, 16]]), pack_tokens=T)


def test_no_units_are_no_packs():
    assert pack([], pack_tokens=T) == []


def test_loss_tokens_are_the_sum_of_the_loss_weights():
    (packed,) = pack([(shift([1, 2, 3, 4], [1, 0, 0.5, 1]),), (shift([1, 2], [0, 1]),)], pack_tokens=T)
    assert packed.loss_tokens == 2.5


@given(LENGTHS, st.integers(1, 5))
def test_every_pack_is_dealt_once(lengths, ranks):
    packs = pack(units_of(lengths), pack_tokens=T)
    shares = deal(packs, ranks=ranks)
    assert len(shares) == ranks
    assert Counter(id(packed) for share in shares for packed in share) == Counter(map(id, packs))


@given(LENGTHS, st.integers(1, 5))
def test_no_rank_is_ahead_of_another_by_more_than_one_pack(lengths, ranks):
    packs = pack(units_of(lengths), pack_tokens=T)
    loads = [sum(packed.num_tokens for packed in share) for share in deal(packs, ranks=ranks)]
    assert max(loads) - min(loads) <= max(packed.num_tokens for packed in packs)


def test_dealing_balances_tokens_not_packs():
    packs = [packed for n in (1, 8, 1, 1, 1, 8, 1, 1) for packed in pack(units_of([[n]]), pack_tokens=8)]
    loads = [sum(packed.num_tokens for packed in share) for share in deal(packs, ranks=2)]
    assert loads == [11, 11]


def test_ranks_beyond_the_packs_get_none():
    shares = deal(pack(units_of([[3]]), pack_tokens=T), ranks=3)
    assert sorted(map(len, shares)) == [0, 0, 1]
