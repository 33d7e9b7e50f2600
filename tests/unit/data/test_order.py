"""The order of rows: a pure function of seed, number of rows and draw."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.order import GROUP_BYTES, BlockOrder, draw, permutation, uniforms

SEEDS = st.integers(0, 2**63 - 1)


def epoch(number, *, seed, num_rows):
    return [draw(n, seed=seed, num_rows=num_rows) for n in range(number * num_rows, (number + 1) * num_rows)]


@given(SEEDS, st.integers(1, 60), st.integers(0, 5))
def test_every_epoch_visits_every_row_once(seed, num_rows, number):
    assert sorted(epoch(number, seed=seed, num_rows=num_rows)) == list(range(num_rows))


@given(SEEDS, st.integers(1, 60), st.lists(st.integers(0, 400), min_size=1))
def test_a_draw_does_not_depend_on_the_draws_before_it(seed, num_rows, draws):
    alone = {n: draw(n, seed=seed, num_rows=num_rows) for n in sorted(draws, reverse=True)}
    for n in draws:
        draw(n + num_rows, seed=seed + 1, num_rows=num_rows)
        assert draw(n, seed=seed, num_rows=num_rows) == alone[n]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(epoch(number, seed=seed, num_rows=50)) for number in range(4) for seed in range(4)}
    assert len(orders) == 16


@pytest.mark.parametrize(("seed", "rows"), [(0, [4, 1, 2, 0, 3, 0, 2, 4, 1, 3]), (7, [2, 3, 1, 0, 4, 1, 4, 0, 3, 2])])
def test_the_order_is_the_same_in_every_version(seed, rows):
    """A change here makes every checkpoint resume with other data: then checkpoints must be refused."""
    assert [draw(n, seed=seed, num_rows=5) for n in range(10)] == rows


BLOCKS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(BLOCKS, st.integers(0, 5))
def test_every_epoch_of_a_block_order_visits_each_row_once(rows, seed):
    order = BlockOrder(np.array(rows), np.full(len(rows), GROUP_BYTES // 3), seed=seed, source=0)
    everything = [(block, row) for block, count in enumerate(rows) for row in range(count)]
    for epoch in range(3):
        positions = np.arange(order.num_rows) + epoch * order.num_rows
        assert sorted(zip(*order.locate(positions), strict=True)) == everything


@given(BLOCKS, st.data())
def test_a_block_order_is_random_access(rows, data):
    def fresh():
        return BlockOrder(np.array(rows), np.full(len(rows), GROUP_BYTES // 2), seed=1, source=2)

    positions = data.draw(st.lists(st.integers(0, 4 * sum(rows)), min_size=1, max_size=30))
    together = list(zip(*fresh().locate(np.array(positions)), strict=True))
    assert together == [tuple(int(x[0]) for x in fresh().locate(np.array([p]))) for p in positions]


def test_reading_a_block_order_touches_each_block_once_an_epoch():
    order = BlockOrder(np.full(40, 7), np.full(40, GROUP_BYTES // 4), seed=0, source=0)
    blocks, _ = order.locate(np.arange(order.num_rows))
    groups = [sorted(set(blocks[start : start + 4 * 7])) for start in range(0, len(blocks), 4 * 7)]
    assert all(len(group) == 4 for group in groups)
    assert sorted(block for group in groups for block in group) == list(range(40))
    assert [sorted(order.group_after(start)) for start in range(0, len(blocks) - 28, 28)] == groups[1:]


def test_block_orders_differ_between_seeds_sources_and_epochs():
    def rows(seed, source, epoch):
        order = BlockOrder(np.full(5, 20), np.full(5, 1), seed=seed, source=source)
        return tuple(zip(*order.locate(np.arange(100) + 100 * epoch), strict=True))

    assert len({rows(0, 0, 0), rows(1, 0, 0), rows(0, 1, 0), rows(0, 0, 1)}) == 4


def test_permutations_and_uniforms_are_the_same_in_every_version():
    assert permutation(8, 1, 2).tolist() == [7, 1, 3, 0, 4, 2, 6, 5]
    assert uniforms(2, 1, 2).tolist() == [0.2996269638247443, 0.0739441105013603]
