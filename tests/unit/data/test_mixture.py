"""The mixture: a pure function of the draw number that keeps its weights, caps and schedules."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.mixture import Mixture, Part, window_draws
from posttrain.data.pack import plan
from posttrain.errors import DataError


def part(name="a", weight=1.0, max_draws=None, num_rows=100):
    schedule = ((0, weight),) if isinstance(weight, int | float) else weight
    return Part(name=name, num_rows=num_rows, weight=schedule, max_draws=max_draws)


def all_draws(mixture, windows):
    return [
        (int(s), int(p))
        for w in range(windows)
        for d in [mixture.window(w)]
        for s, p in zip(d.source, d.position, strict=True)
    ]


CAPS = st.lists(st.tuples(st.floats(0.1, 10), st.integers(1, 90)), min_size=1, max_size=5)


@given(CAPS, st.integers(0, 9))
def test_a_capped_mixture_draws_every_position_of_every_source_once(caps, seed):
    parts = [part(weight=weight, max_draws=cap) for weight, cap in caps]
    mixture = Mixture(parts, seed=seed, window=16)
    total = mixture.total_draws()
    drawn = all_draws(mixture, total // 16 + 2)
    assert sorted(drawn) == [(i, k) for i, (_, cap) in enumerate(caps) for k in range(cap)]
    assert len(drawn) == total


@given(CAPS, st.integers(0, 30))
def test_any_window_is_the_same_without_the_windows_before_it(caps, index):
    def fresh():
        return Mixture([part(weight=3.0), *(part(weight=w, max_draws=cap) for w, cap in caps)], seed=4, window=8)

    walked = fresh()
    for window in range(index):
        walked.window(window)
    one, other = walked.window(index), fresh().window(index)
    resumed = fresh()
    resumed.resume(index, walked.counts_before(index).tolist())
    third = resumed.window(index)
    for found in (other, third):
        assert one.first == found.first
        assert one.source.tolist() == found.source.tolist() and one.position.tolist() == found.position.tolist()


def test_shares_follow_the_weights():
    counts = Mixture([part(weight=1.0), part(weight=3.0)], seed=0).counts_before(100)
    assert counts.sum() == 100 * 1024
    assert abs(counts[1] / counts.sum() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / counts.sum())


def test_a_schedule_moves_the_shares_over_the_draws():
    mixture = Mixture([part(weight=1.0), part(weight=((0, 0.0), (10 * 1024, 1.0)))], seed=0)
    assert mixture.counts_before(1)[1] == 0
    later = mixture.counts_before(200) - mixture.counts_before(100)
    assert abs(later[1] / later.sum() - 0.5) < 0.01


def test_a_used_up_source_leaves_its_share_to_the_others():
    mixture = Mixture([part(weight=1.0, max_draws=10), part(weight=1.0), part(weight=2.0)], seed=3)
    counts = mixture.counts_before(50)
    assert counts[0] == 10
    assert abs(counts[2] / (counts[1] + counts[2]) - 2 / 3) < 0.02


def test_packs_of_any_length_take_enough_draws_to_be_full():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(350), 1.2, 16 * 8192), 16, 8192).astype(int)
    for pack_tokens in (8192, 16_384, 32_768, 65_536):
        size = window_draws(pack_tokens)
        windows = [lengths[start : start + size].tolist() for start in range(0, len(lengths), size)]
        packs = sum(len(plan(window, pack_tokens=pack_tokens)) for window in windows)
        assert lengths.sum() / (packs * pack_tokens) > 0.99, pack_tokens
    assert window_draws(1024) == 1024  # what checkpoints of small runs have counted in


def test_a_mixture_without_an_end_says_so():
    assert Mixture([part(max_draws=5), part()], seed=0).total_draws() is None


@pytest.mark.parametrize("parts", [[], [part(weight=0.0)]])
def test_a_mixture_that_can_draw_nothing_is_refused(parts):
    with pytest.raises(DataError):
        Mixture(parts, seed=0)


def test_sources_that_are_left_with_weight_zero_are_refused_and_not_taken_for_the_end():
    parts = [
        Part(name="one", num_rows=9, weight=((0, 1.0),), max_draws=9),
        Part(name="late", num_rows=9, weight=((100, 0.0), (200, 1.0)), max_draws=None),
    ]
    with pytest.raises(DataError, match="in draws 0 to 15 every source that is not used up has weight 0"):
        Mixture(parts, seed=0, window=16).window(0)
