"""The order of rows: a pure function of seed, number of rows and draw."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.order import draw

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
