"""A rank that is slower at equal work is named, once; one that was given more work is not."""

import pytest

from posttrain.workflow.straggler import WINDOW, Stragglers, imbalance


def reports(stragglers: Stragglers, seconds: list[float], work: list[float], steps: int) -> list[str]:
    return [text for _ in range(steps) if (text := stragglers.seen(seconds, work))]


def test_a_slow_rank_is_named_once_with_its_host():
    stragglers = Stragglers(["a", "b", "c"])
    found = reports(stragglers, [1.0, 1.0, 1.5], [1.0] * 3, 3 * WINDOW)
    assert len(found) == 1
    assert found[0].startswith(
        f"policy rank 2 on c is a straggler: the slowest in {WINDOW} of the last {WINDOW} steps, 50%"
    )


def test_no_rank_is_named_before_the_window_is_full():
    assert not reports(Stragglers(["a", "b"]), [1.0, 2.0], [1.0, 1.0], WINDOW - 1)


def test_a_rank_with_more_work_is_not_slow():
    assert not reports(Stragglers(["a", "b"]), [1.0, 2.0], [1.0, 2.0], 2 * WINDOW)


def test_being_slowest_by_little_or_in_half_of_the_steps_is_no_report():
    assert not reports(Stragglers(["a", "b"]), [1.0, 1.09], [1.0, 1.0], 2 * WINDOW)
    stragglers = Stragglers(["a", "b"])
    found = [stragglers.seen(s, [1.0, 1.0]) for _ in range(WINDOW) for s in ([1.0, 2.0], [2.0, 1.0])]
    assert not any(found)


def test_a_rank_without_packs_is_left_out():
    found = reports(Stragglers(["a", "b", "c"]), [1.0, 0.0, 2.0], [1.0, 0.0, 1.0], WINDOW)
    assert len(found) == 1 and "rank 2" in found[0]


def test_imbalance_is_the_largest_over_the_mean():
    assert imbalance([1.0, 1.0]) == 1
    assert imbalance([3.0, 1.0]) == pytest.approx(1.5)
    assert imbalance([4.0, 0.0, 0.0, 0.0]) == 4
