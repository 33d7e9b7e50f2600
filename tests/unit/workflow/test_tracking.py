"""A tracker gets every step once, and whatever it does the run goes on."""

import threading
import time

import pytest

from posttrain.data.types import Prompt, Rollout
from posttrain.workflow import tracking
from posttrain.workflow.tracking import RunFacts, Tracking, tracked, without_secrets

FACTS = RunFacts(run_id="r", name="run", folder="runs/F/1", config={}, first_step=0)


class Kept:
    """Keeps what it is told; `has` is the first step that it lacks."""

    def __init__(self, has: int = 0):
        self.has, self.steps, self.texts, self.status, self.facts = has, [], [], None, FACTS

    def start(self, facts):
        self.facts = facts
        return self.has

    def log(self, step, metrics):
        assert "step" not in metrics
        self.steps.append(step)

    def text(self, step, name, text):
        self.texts.append((step, name, text))

    def finish(self, status):
        self.status = status


def rows(first: int, end: int) -> list[dict[str, float]]:
    return [{"step": step, "loss": 1.0 / (step + 1)} for step in range(first, end)]


def run(tracker, *, history: int = 0, steps: int = 5) -> Tracking:
    """One attempt of a run with this tracker."""
    with tracked({"mine": tracker}, FACTS) as (observer,):
        observer.restore(rows(0, history))
        for row in rows(history, steps):
            observer.step(row)
    return observer


def test_every_step_and_the_end_arrive_in_order():
    kept = Kept()
    assert run(kept).counts == {"logged": 5, "failed": 0, "dropped": 0}
    assert kept.steps == [0, 1, 2, 3, 4] and kept.status == "finished"


def test_a_run_that_raised_is_marked_failed():
    kept = Kept()
    with pytest.raises(KeyError), tracked({"mine": kept}, FACTS) as (observer,):
        observer.restore([])
        raise KeyError
    assert kept.status == "failed"


@pytest.mark.parametrize("has, got", [(2, [2, 3, 4]), (3, [3, 4]), (4, [4]), (0, [0, 1, 2, 3, 4])])
def test_after_a_resume_a_tracker_gets_what_it_lacks_and_nothing_twice(has: int, got: list[int]):
    kept = Kept(has)
    run(kept, history=3)
    assert kept.facts.first_step == 3
    assert kept.steps == got


def test_a_failing_tracker_is_warned_of_once_and_counted(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")

    class Failing(Kept):
        def log(self, step, metrics):
            raise ConnectionError("no route to https://me:pw@host with 0123456789abcdef")

    assert run(Failing()).counts == {"logged": 0, "failed": 5, "dropped": 0}
    out = capsys.readouterr().out
    assert out.count("ConnectionError: no route to https://***@host with ***") == 1
    assert "5 failed" in out and "0123456789abcdef" not in out and "pw@" not in out


def test_a_tracker_that_was_down_at_the_start_gets_everything_when_it_is_back(monkeypatch):
    monkeypatch.setattr(tracking, "RETRY_S", 0.0)

    class Late(Kept):
        tries = 0

        def start(self, facts):
            self.tries += 1
            if self.tries < 3:
                raise ConnectionError
            return 0

    late = Late()
    assert run(late, history=2).counts == {"logged": 5, "failed": 0, "dropped": 0}
    assert late.steps == [0, 1, 2, 3, 4]


def test_a_tracker_that_never_starts_is_not_used(capsys):
    class Never(Kept):
        def start(self, facts):
            raise PermissionError("denied")

    never = Never()
    assert run(never).counts["failed"] == 5
    assert never.steps == [] and never.status is None
    assert capsys.readouterr().out.count("PermissionError: denied") == 1


def test_a_hanging_tracker_costs_points_and_no_time(monkeypatch, capsys):
    monkeypatch.setattr(tracking, "QUEUED", 10)
    monkeypatch.setattr(tracking, "FINISH_S", 0.2)
    release = threading.Event()

    class Hanging(Kept):
        def log(self, step, metrics):
            release.wait()

    started = time.monotonic()
    observer = run(Hanging(), steps=100)
    assert time.monotonic() - started < 30, "bounded by FINISH_S twice"
    assert observer.counts["logged"] == 0
    assert observer.counts["dropped"] == 99, "all but the one that it holds"
    assert "points are dropped" in capsys.readouterr().out
    release.set()


def test_rollouts_are_shown_as_text_but_not_at_every_step():
    prompt = Prompt(uid=0, token_ids=(1,), row={"prompt": "sort 21"})
    rollout = Rollout(
        prompt=prompt,
        sample_index=0,
        token_ids=(1,),
        logprobs=(0.0,),
        versions=(0,),
        finish_reason="stop",
        text="12",
        reward=1.0,
    )
    kept = Kept()
    with tracked({"mine": kept}, FACTS) as (observer,):
        observer.restore([])
        for row in rows(0, 3):
            observer.step(row)
            observer.rollouts(int(row["step"]), [[rollout]])
        observer.note("rank 1 is slow")
    assert [(step, name) for step, name, _ in kept.texts] == [(0, "rollout"), (3, "note")]
    assert "sort 21" in kept.texts[0][2] and "12" in kept.texts[0][2]


def test_secrets_are_masked_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct-horse")
    assert without_secrets("401 for correct-horse at http://u:p@h/x") == "401 for *** at http://***@h/x"
