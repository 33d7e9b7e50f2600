"""What is told of a run that goes wrong without an error, and that nothing is told of one that does not."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.workflow.observers import Observers
from posttrain.workflow.watch import FIRST, IN_A_ROW, WINDOW, Watch

CALM = [2.0 + 0.05 * math.sin(step) for step in range(60)]


class Heard:
    """An observer that keeps what it is told."""

    def __init__(self):
        self.notes, self.steps = [], []

    def restore(self, history):
        self.steps = list(history)

    def step(self, metrics):
        self.steps.append(metrics)

    def note(self, text):
        self.notes.append(text)


def heard(values: list[float], name: str = "loss", after: list[float] = ()) -> Heard:
    """What a run says whose steps had these values; `after` are those since a resume."""
    observer = Heard()
    observers = Observers([observer])
    for step, value in enumerate(values):
        observers.step({"step": step, name: value})
    if after:
        resumed = Observers([observer])
        resumed.restore(observers.history)
        for step, value in enumerate(after, start=len(values)):
            resumed.step({"step": step, name: value})
    return observer


@pytest.mark.fault("F44", outcome="CONTINUE")
@pytest.mark.parametrize("name", ["loss", "grad_norm", "policy/grad_norm"])
def test_a_jump_that_stays_is_told_once_and_its_steps_are_counted(name: str):
    found = heard([*CALM, *[9.0] * 10], name)
    (note,) = found.notes
    assert note.startswith(f"WARNING: step {len(CALM) + IN_A_ROW} and the 2 before it: ")
    assert "is 9, where 2.01 with a spread of" in note
    assert [step.get("watch/steps") for step in found.steps[-10:]] == [None, None, *map(float, range(1, 9))]


def test_a_jump_of_fewer_steps_is_not_told():
    found = heard([*CALM, *[9.0] * (IN_A_ROW - 1), *CALM, 9.0, 2.0, 9.0, 2.0, 9.0])
    assert not found.notes and "watch/steps" not in found.steps[-1]


def test_a_second_jump_is_told_again_once_it_was_calm_for_long():
    assert len(heard([*CALM, *[9.0] * 4, *CALM[:10], *[9.0] * 4]).notes) == 1
    assert len(heard([*CALM, *[9.0] * 4, *CALM[: WINDOW + 1], *[9.0] * 4]).notes) == 2


@pytest.mark.fault("F44", outcome="CONTINUE")
def test_an_entropy_that_collapses_is_told_with_what_it_was():
    (note,) = heard([1.5] * FIRST + [0.5] * 5 + [0.05] * 5, "policy/entropy").notes
    assert f"step {FIRST + 5 + IN_A_ROW} " in note and "entropy is 0.05 nats per token, of 1.5 at first" in note


@pytest.mark.fault("F44", outcome="CONTINUE")
@pytest.mark.parametrize(("name", "value"), [("policy/kl", 6.0), ("policy/mismatch_kl", 0.2)])
def test_a_kl_above_its_ceiling_is_told_from_the_first_steps_on(name: str, value: float):
    (note,) = heard([0.0, *[value] * 5], name).notes
    assert "step 4 " in note and f"{name} is {value:g} nats per token" in note


def test_an_entropy_that_was_always_low_or_falls_by_degrees_to_a_fair_level_is_not_told():
    assert not heard([0.01] * 100, "policy/entropy").notes
    assert not heard([2.0 * 0.97**step for step in range(90)], "policy/entropy").notes


@given(seed=st.integers(0, 2**32), tails=st.sampled_from(["normal", "lognormal", "exponential"]))
def test_a_curve_of_noise_around_a_falling_mean_is_not_told(seed: int, tails: str):
    chance = random.Random(seed)
    noise = {
        "normal": lambda: chance.gauss(1.0, 0.2),
        "lognormal": lambda: chance.lognormvariate(0.0, 0.5),
        "exponential": lambda: chance.expovariate(1.0),
    }[tails]
    assert not heard([(1.0 + 5.0 * math.exp(-step / 30)) * noise() for step in range(150)]).notes


def test_a_metric_that_is_not_watched_is_not_told():
    assert not heard([*CALM, *[9.0] * 10], "reward/mean").notes


@pytest.mark.parametrize("cut", [20, len(CALM) + 1, len(CALM) + 4, len(CALM) + 30])
def test_a_resumed_run_counts_and_tells_as_one_that_was_left_alone(cut: int):
    values = [*CALM, *[9.0] * 5, *CALM, *[9.0] * 5]
    whole, parts = heard(values), heard(values[:cut], after=values[cut:])
    assert parts.steps == whole.steps and parts.notes == whole.notes and whole.notes


def test_what_was_told_before_a_resume_is_not_told_again():
    told = Watch([{"step": step, "loss": value} for step, value in enumerate([*CALM, *[9.0] * 5])])
    assert not told.notes and told.steps == 3
