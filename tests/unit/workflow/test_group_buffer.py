"""Batches hold what draw order says, in any order of completion, and never a rollout older than the bound."""

import asyncio
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.deadline import DeadlineError
from posttrain.errors import RewardError
from posttrain.workflow.group_buffer import MAX_SILENT_BATCHES, GroupBuffer
from posttrain.workflow.ledger import Ledger
from posttrain.workflow.rollouts import Dropped, Group, Limit

FAILED = Dropped(reason="reward_error", error=RewardError("the verifier is down"))
LIMITS = {"reward_error": Limit(1000, "a failed reward", "reward.max_failures")}


class Run:
    """A controller's calls to a buffer, with nothing behind them: a group is the number of its draw."""

    def __init__(self, ledger: Ledger, *, batch: int, staleness: int, steps: int, done: int = 0, limits=LIMITS):
        sizes = {"prompts_per_step": batch, "max_staleness": staleness, "num_steps": steps}
        self.ledger, self.buffer = ledger, GroupBuffer(ledger, **sizes, limits=limits)
        self.staleness, self.steps, self.batch = staleness, steps, batch
        self.trained, self.version = done, done
        self.training = []
        self.begun: dict[int, int] = {}
        self.batches: list[list[int]] = []
        self.admit()

    def admit(self) -> None:
        self.begun |= dict.fromkeys(self.buffer.admit(self.version), self.version)

    def finish(self, uid: int, made: Dropped | None = None) -> None:
        self.buffer.finish(uid, [uid] if made is None else made)  # pyright: ignore[reportArgumentType]
        self.admit()

    def under_way(self) -> list[int]:
        return [uid for uid, phase in self.ledger.open.items() if phase == "queued"]

    def take(self) -> bool:
        """Begin a step, if its batch is there."""
        groups = self.buffer.take()
        if groups is None:
            return False
        self.training: list[int] = [uid for (uid,) in groups]  # pyright: ignore[reportAttributeAccessIssue]
        assert self.trained - min(self.begun[uid] for uid in self.training) <= self.staleness, "the age bound"
        return True

    def end_step(self) -> None:
        """The policy has trained what was taken; weights reach the generators later."""
        self.ledger.commit([], draws=self.training)
        assert self.ledger.balance() == len(self.buffer) == len(self.ledger.open)
        self.batches.append(self.training)
        self.trained, self.training = self.trained + 1, []

    def train(self) -> bool:
        taken = self.take()
        if taken:
            self.end_step()
        return taken


def expected(drops: set[int], *, batch: int, steps: int) -> list[list[int]]:
    kept = [uid for uid in range(batch * steps + len(drops)) if uid not in drops][: batch * steps]
    return [kept[step * batch : (step + 1) * batch] for step in range(steps)]


def play(run: Run, choose, drops: set[int], *, until: int) -> None:
    """Let things happen in the order that `choose(count)` picks, until so many steps are trained."""
    while run.trained < until:
        open_draws = run.under_way()
        what = choose(len(open_draws) + 1)
        if what < len(open_draws):
            uid = open_draws[what]
            run.finish(uid, FAILED if uid in drops else None)
        elif run.training:
            run.end_step()
        elif run.version < run.trained:
            run.version += 1
            run.admit()
        else:  # the loop goes on when its last weights have been sent
            run.take()
        goes_on = run.under_way() or run.training or run.version < run.trained or run.trained == run.steps
        assert goes_on or run.take(), "neither a group under way nor a batch: the run would wait for ever"


@given(
    data=st.data(),
    batch=st.integers(1, 4),
    staleness=st.integers(0, 3),
    steps=st.integers(1, 5),
    drops=st.sets(st.integers(0, 25), max_size=12),
)
@pytest.mark.fault("F7", outcome="CONTINUE")
def test_any_order_of_events_trains_the_same_batches_within_the_age_bound(data, batch, staleness, steps, drops):
    def choose(count):
        return data.draw(st.integers(0, count - 1))

    killed_after = data.draw(st.integers(0, steps))
    first = Run(Ledger(), batch=batch, staleness=staleness, steps=steps)
    play(first, choose, drops, until=killed_after)
    state = json.loads(json.dumps(first.ledger.state()))
    resumed = Run(Ledger(state), batch=batch, staleness=staleness, steps=steps, done=killed_after)
    play(resumed, choose, drops, until=steps)
    assert first.batches + resumed.batches == expected(drops, batch=batch, steps=steps)
    ledger = resumed.ledger
    last = max(resumed.batches[-1]) if resumed.batches else max(first.batches[-1])
    assert ledger.trained == batch * steps
    assert sum(ledger.dropped.values()) == len([uid for uid in drops if uid <= last])
    if killed_after < steps:
        assert not ledger.open and ledger.balance() == 0, "nothing is begun that is never trained"


def test_with_staleness_0_a_step_begins_when_the_one_before_is_trained_and_sent():
    run = Run(Ledger(), batch=2, staleness=0, steps=3)
    assert run.under_way() == [0, 1]
    run.finish(0)
    run.finish(1)
    assert run.train() and not run.under_way()
    run.version = 1
    run.admit()
    assert run.under_way() == [2, 3]


def test_what_is_dropped_of_a_wave_is_replaced_when_all_of_it_is_done():
    run = Run(Ledger(), batch=4, staleness=0, steps=1)
    run.finish(2, FAILED)
    run.finish(0, FAILED)
    run.finish(1)
    assert run.under_way() == [3]
    run.finish(3)
    assert run.under_way() == [4, 5], "together, as engines like it, and in whatever order they ended"


def test_drops_past_their_budget_stop_the_run_also_when_some_were_before_a_resume():
    ledger = Ledger({"digest": "", "drawn": 5, "trained": 4, "dropped": {"reward_error": 1}})
    limits = {"reward_error": Limit(2, "a failed reward", "reward.max_failures")}
    run = Run(ledger, batch=4, staleness=0, steps=2, done=1, limits=limits)
    run.finish(5, FAILED)
    message = "3 groups dropped for a failed reward, reward.max_failures is 2; the last: the verifier is down"
    with pytest.raises(RewardError, match=message):
        run.finish(6, FAILED)


@pytest.mark.fault("F48", outcome="STOP")
def test_groups_without_signal_stop_the_run_only_when_many_are_in_a_row():
    silent = Dropped(reason="no_signal")
    run = Run(Ledger(), batch=2, staleness=0, steps=9)
    for _ in range(MAX_SILENT_BATCHES * 2 - 1):
        run.finish(run.under_way()[0], silent)
    run.finish(run.under_way()[0])
    for _ in range(MAX_SILENT_BATCHES * 2 - 1):
        run.finish(run.under_way()[0], silent)
    with pytest.raises(RewardError, match="20 groups in a row had no different rewards"):
        run.finish(run.under_way()[0], silent)


@pytest.mark.fault("F7", outcome="STOP")
def test_a_run_in_which_no_group_comes_to_an_end_stops_and_says_how_far_they_are():
    async def wait() -> list[Group]:
        run = Run(Ledger(), batch=3, staleness=0, steps=1)
        run.ledger.move(1, "in_flight")
        run.ledger.move(2, "in_flight")
        return await run.buffer.next_batch(stall_s=0.01)

    message = "2 in flight, first draw 1.*did not finish within 0.01 s"
    with pytest.raises(DeadlineError, match=message) as error:
        asyncio.run(wait())
    assert "1 queued, first draw 0" in str(error.value)


@pytest.mark.fault("F7", outcome="CONTINUE")
def test_a_wait_that_is_woken_has_all_its_time_again():
    async def wait() -> float:
        run = Run(Ledger(), batch=3, staleness=0, steps=1)
        loop = asyncio.get_running_loop()
        start = loop.time()
        loop.call_later(0.2, run.buffer.wake)
        with pytest.raises(DeadlineError):
            await run.buffer.next_batch(stall_s=0.4)
        return loop.time() - start

    assert asyncio.run(wait()) >= 0.55


def test_the_end_of_a_group_costs_the_same_however_many_are_open():
    def opcodes_a_group(count: int) -> float:
        """Of our own code, from admission until the batch is taken."""
        ran = 0

        def trace(frame, event, _):
            nonlocal ran
            if "posttrain" not in frame.f_code.co_filename:
                return None
            frame.f_trace_opcodes = True
            ran += event == "opcode"
            return trace

        async def one_step() -> None:
            sizes = {"prompts_per_step": count, "max_staleness": 0, "num_steps": 1}
            buffer = GroupBuffer(Ledger(), **sizes, limits=LIMITS)
            taking = asyncio.create_task(buffer.next_batch(stall_s=60))
            for uid in buffer.admit(0):
                for _ in range(5):  # who waits for the batch hears of every end
                    await asyncio.sleep(0)
                buffer.finish(uid, [uid])  # pyright: ignore[reportArgumentType]
                buffer.admit(0)
            assert len(await taking) == count

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            asyncio.run(one_step())
        finally:
            sys.settrace(before)
        return ran / count

    assert opcodes_a_group(400) < 1.1 * opcodes_a_group(40)
