"""Packing loses, repeats and splits nothing; dealing gives every rank its fair share."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.pack import attention_cost, deal, fill, pack, plan
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


def tokens(packed):
    return packed.num_tokens


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
    shares = deal(packs, ranks=ranks, cost=tokens)
    assert len(shares) == ranks
    assert Counter(id(packed) for share in shares for packed in share) == Counter(map(id, packs))


@given(LENGTHS, st.integers(1, 5))
def test_no_rank_is_ahead_of_another_by_more_than_one_pack(lengths, ranks):
    packs = pack(units_of(lengths), pack_tokens=T)
    loads = [sum(packed.num_tokens for packed in share) for share in deal(packs, ranks=ranks, cost=tokens)]
    assert max(loads) - min(loads) <= max(packed.num_tokens for packed in packs)


def test_dealing_balances_tokens_not_packs():
    packs = [packed for n in (1, 8, 1, 1, 1, 8, 1, 1) for packed in pack(units_of([[n]]), pack_tokens=8)]
    loads = [sum(packed.num_tokens for packed in share) for share in deal(packs, ranks=2, cost=tokens)]
    assert loads == [11, 11]


def test_ranks_beyond_the_packs_get_none():
    shares = deal(pack(units_of([[3]]), pack_tokens=T), ranks=3, cost=tokens)
    assert sorted(map(len, shares)) == [0, 0, 1]


@given(LENGTHS, st.integers(1, 5))
def test_ranks_get_equally_many_packs_or_one_less(lengths, ranks):
    sizes = [len(share) for share in deal(pack(units_of(lengths), pack_tokens=T), ranks=ranks, cost=tokens)]
    assert max(sizes) - min(sizes) <= 1


def test_dealing_balances_attention_and_not_tokens_alone():
    packs = [packed for each in ([8], [4, 4], [8], [4, 4]) for packed in pack(units_of([each]), pack_tokens=8)]
    shares = deal(packs, ranks=2, cost=lambda p: attention_cost(p, linear=1.0, quadratic=1.0))
    assert [sorted(len(p.samples) for p in share) for share in shares] == [[1, 2], [1, 2]]


def test_the_cost_of_a_pack_counts_pairs_within_documents_only():
    (packed,) = pack(units_of([[3], [5]]), pack_tokens=8)
    assert attention_cost(packed, linear=2.0, quadratic=10.0) == 2.0 * 8 + 10.0 * (9 + 25)


def test_a_pack_keeps_the_draw_numbers_of_its_units():
    packs = pack(units_of([[20], [30], [12]]), pack_tokens=T, draws=[7, 8, 9])
    assert sorted(p.draws for p in packs) == [(7, 9), (8,)]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_a_plan_is_best_fit_with_the_long_units_first(sizes):
    """The same packs as the textbook's quadratic search."""
    bins: list[list[int]] = []
    long = sorted((i for i in range(len(sizes)) if sizes[i] >= 64 // 4), key=lambda i: -sizes[i])
    for index in [*long, *(i for i in range(len(sizes)) if i not in long)]:
        fits = [b for b in bins if sum(sizes[i] for i in b) + sizes[index] <= 64]
        chosen = max(fits, key=lambda b: sum(sizes[i] for i in b), default=None)
        if chosen is None:
            bins.append([index])
        else:
            chosen.append(index)
    assert plan(sizes, pack_tokens=64) == [sorted(b) for b in bins]


@pytest.mark.parametrize("workload", ["lognormal", "mostly short"])
def test_windows_of_skewed_lengths_fill_their_packs_to_98_percent(workload):
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(350), 1.2, 8 * 1024)
    if workload == "mostly short":
        short = rng.lognormal(np.log(120), 0.6, len(lengths))
        lengths = np.where(rng.random(len(lengths)) < 0.95, short, rng.uniform(4096, 8192, len(lengths)))
    lengths = np.clip(lengths, 1, 8192).astype(int)
    packs = sum(len(plan(lengths[i : i + 1024].tolist(), pack_tokens=8192)) for i in range(0, len(lengths), 1024))
    assert lengths.sum() / (packs * 8192) >= 0.98


def test_fill_is_the_share_of_positions_that_hold_a_token():
    assert fill(pack(units_of([[8], [24]]), pack_tokens=T), pack_tokens=T) == 1.0
    assert fill(pack(units_of([[8]]), pack_tokens=T), pack_tokens=T) == 0.25
