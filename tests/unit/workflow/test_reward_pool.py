"""Groups are scored side by side in processes; whatever one of them does, the others' scores are what they were."""

import asyncio
import json
import re
import time
from pathlib import Path

import pytest

from posttrain.compute.reaper import marked
from posttrain.errors import ConfigError, RewardError
from posttrain.workflow.reward_pool import RewardPool

GOOD = {"messages": [{"role": "user", "content": "2+2?"}]}


def run(function, rows, *, timeout_s=20.0, workers=1, **options):
    """Scores or the error of each row, for the completions "a" and "bb"; and the pool's processes before and after."""

    async def score():
        pool = RewardPool(function, timeout_s=timeout_s, workers=workers, **options)
        await pool.ready()
        calls = [pool.score(row, ["a", "bb"]) for row in rows]
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(score())


def test_groups_are_scored_side_by_side_and_come_back_in_order(tmp_path: Path):
    # The first group waits for what the second writes: one process alone would never finish.
    sign = str(tmp_path / "sign")
    rows = [{"wait_for": sign}, {"touch": sign}, {}]
    found = run("bad_rewards:slow_when_asked", rows, workers=2)
    assert found == [[(1.0, {"reward": 1.0}), (2.0, {"reward": 2.0})]] * 3


@pytest.mark.fault("F46", outcome="CONTINUE")
def test_a_hang_costs_its_group_alone_and_its_process_is_replaced(record_property):
    start = time.monotonic()
    found = run("bad_rewards:as_the_row_says", [GOOD | {"does": "hang"}, GOOD], timeout_s=2)
    assert isinstance(found[0], RewardError) and "reward 0: score() did not finish within 2 s" in str(found[0])
    assert found[1] == [(1.0, {"reward": 1.0})] * 2
    record_property("detected_s", time.monotonic() - start)


@pytest.mark.fault("F46", outcome="CONTINUE")
def test_a_child_that_hangs_in_a_session_of_its_own_is_killed_too(tmp_path: Path):
    pid_file = tmp_path / "pid"
    found = run("bad_rewards:as_the_row_says", [{"does": "hang in a child", "pid_file": str(pid_file)}], timeout_s=2)
    assert isinstance(found[0], RewardError)
    status = Path(f"/proc/{pid_file.read_text()}/status")
    assert not status.exists() or "\nState:\tZ" in status.read_text()


@pytest.mark.fault("F46", outcome="CONTINUE")
def test_a_process_that_dies_is_an_error_and_is_replaced(noticed):
    with noticed():
        found = run("bad_rewards:as_the_row_says", [{"does": "die"}, GOOD])
    assert str(found[0]) == "reward 0 died during score(): exit status 3"
    assert found[1] == [(1.0, {"reward": 1.0})] * 2


@pytest.mark.fault("F45", outcome="CONTINUE")
def test_a_reward_that_raises_names_the_function_the_completion_and_the_question():
    found = run("bad_rewards:as_the_row_says", [GOOD | {"does": "raise"}, GOOD])
    assert re.fullmatch(
        r"bad_rewards:as_the_row_says raised KeyError: 'no such field' in bad_rewards.py, line \d+, "
        r"on completion 0: 'a'; asked '2\+2\?'",
        str(found[0]),
    )
    assert found[1] == [(1.0, {"reward": 1.0})] * 2


def again(rows, *, every):
    """Scores, how many groups differed, and the notes, of one process that is asked again for one group of `every`."""

    async def score():
        pool = RewardPool("bad_rewards:as_the_row_says", timeout_s=2, ask_again=every)
        await pool.ready()
        scores = [await pool.score(row, ["a", "bb"]) for row in rows]
        return scores, pool.differed, pool.notes

    return asyncio.run(score())


@pytest.mark.fault("F49", outcome="CONTINUE")
def test_a_reward_that_is_not_deterministic_is_counted_and_told_once_and_its_first_scores_count():
    scores, differed, notes = again([{"does": "count"}] * 4, every=2)
    assert [[value for value, _ in group] for group in scores] == [[1, 2], [3, 4], [7, 8], [9, 10]]
    assert differed == 2 and len(notes) == 1
    assert notes[0].startswith("the reward is not deterministic: it gave one group [[3.0")


@pytest.mark.fault("F49", outcome="CONTINUE")
def test_a_reward_that_is_deterministic_is_never_said_to_be_otherwise():
    scores, differed, notes = again([GOOD] * 3, every=1)
    assert (differed, notes) == (0, []) and len(scores) == 3


@pytest.mark.fault("F49", outcome="CONTINUE")
def test_a_second_scoring_that_hangs_costs_its_process_and_not_the_group():
    scores, differed, _ = again([{"does": "hang the second time"}, GOOD], every=1)
    assert scores == [[(1.0, {"reward": 1.0})] * 2] * 2 and differed == 1


@pytest.mark.parametrize("value", [None, "1.0", [1.0], {"format": 1.0, "answer": None}, {}], ids=json.dumps)
@pytest.mark.fault("F47", outcome="CONTINUE")
def test_what_is_no_number_is_an_error_and_never_zero(value):
    (found,) = run("bad_rewards:as_the_row_says", [GOOD | {"does": "return", "value": value}])
    assert isinstance(found, RewardError)
    assert "bad_rewards:as_the_row_says, completion 0: " in str(found) and "asked '2+2?'" in str(found)


def test_what_a_reward_prints_is_not_taken_for_its_answer():
    assert run("bad_rewards:as_the_row_says", [{"does": "print"}]) == [[(1.0, {"reward": 1.0})] * 2]


def test_a_group_of_megabytes_is_scored():
    async def score():
        return await RewardPool("bad_rewards:long_answer", timeout_s=60).score({}, ["x" * 3_000_000, "y"])

    assert [value for value, _ in asyncio.run(score())] == [3_000_000.0, 1.0]


def test_a_function_that_does_not_exist_is_refused():
    async def ready():
        await RewardPool("bad_rewards:nothing", timeout_s=5).ready()

    with pytest.raises(ConfigError, match=r"reward\.function: bad_rewards:nothing: bad_rewards has no 'nothing'"):
        asyncio.run(ready())


def test_a_wait_that_is_given_up_does_not_leave_a_busy_process():
    async def score():
        pool = RewardPool("bad_rewards:as_the_row_says", timeout_s=3600)
        await pool.ready()
        waiting = asyncio.create_task(pool.score({"does": "hang"}, ["a"]))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        return await pool.score({}, ["a"])

    assert asyncio.run(score()) == [(1.0, {"reward": 1.0})]


def test_no_process_outlives_the_event_loop():
    async def marks():
        pool = RewardPool("bad_rewards:as_the_row_says", timeout_s=5, workers=2)
        await pool.ready()
        found = [child.mark for _, child in list(pool._idle._queue) if child]  # type: ignore[attr-defined]
        assert len(found) == 2 and all(marked(mark, name="POSTTRAIN_CHILD") for mark in found)
        return found

    found = asyncio.run(marks())
    deadline = time.monotonic() + 10
    while any(marked(mark, name="POSTTRAIN_CHILD") for mark in found):
        assert time.monotonic() < deadline
