"""Who hears of a run's progress: the terminal, a JSONL file, and (workflow/card.py) the live card."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from posttrain import storage
from posttrain.data.types import Rollout
from posttrain.workflow.rollouts import DroppedGroup
from posttrain.workflow.watch import Watch

Metrics = dict[str, float]


class Observer(Protocol):
    """Hears of every step once, in order; after a resume first of the steps already done."""

    def restore(self, history: Sequence[Metrics]) -> None:
        """Take the steps of an earlier attempt."""
        ...

    def step(self, metrics: Metrics) -> None:
        """One finished step: its number under "step", and floats named noun/stat."""
        ...

    def rollouts(self, step: int, groups: Sequence[Sequence[Rollout]], dropped: Sequence[DroppedGroup] = ()) -> None:
        """The scored groups of a step, and those that were dropped since the last."""
        ...

    def note(self, text: str) -> None:
        """Something that a person should know; said once."""
        ...


class Terminal:
    """One line a step: number, the named metrics, seconds, time left."""

    def __init__(self, label: str, num_steps: int, show: Sequence[str], *, every: int = 1):
        self.label, self.num_steps, self.show, self.every = label, num_steps, show, every
        self.started, self.done_before = time.monotonic(), 0

    def restore(self, history: Sequence[Metrics]) -> None:
        self.done_before = len(history)
        if history:
            print(f"{self.label}: continuing after step {len(history)} of {self.num_steps}", flush=True)

    def step(self, metrics: Metrics) -> None:
        done = int(metrics["step"]) + 1
        if done % self.every and done != self.num_steps:
            return
        pace = (time.monotonic() - self.started) / (done - self.done_before)
        left = round(pace * (self.num_steps - done))
        shown = "  ".join(f"{name} {metrics[name]:.3f}" for name in self.show if name in metrics)
        print(
            f"{self.label} {done:>{len(str(self.num_steps))}}/{self.num_steps}  {shown}  "
            f"{pace:.1f} s/step  ETA {left // 60}:{left % 60:02d}",
            flush=True,
        )

    def rollouts(self, step: int, groups: Sequence[Sequence[Rollout]], dropped: Sequence[DroppedGroup] = ()) -> None:
        """Nothing: rollouts are for the card."""

    def note(self, text: str) -> None:
        print(f"{self.label}: {text}", flush=True)


class MetricsFile:
    """Every step as one JSON line; lines of steps that a resume will repeat are dropped."""

    def __init__(self, uri: str):
        self.uri, self.lines = uri, []

    def restore(self, history: Sequence[Metrics]) -> None:
        self.lines = [json.dumps(row) for row in history]
        self._write_all()

    def step(self, metrics: Metrics) -> None:
        self.lines.append(json.dumps(metrics))
        if storage.is_s3(self.uri):
            self._write_all()
            return
        Path(self.uri).parent.mkdir(parents=True, exist_ok=True)
        with open(self.uri, "a") as file:
            file.write(self.lines[-1] + "\n")

    def rollouts(self, step: int, groups: Sequence[Sequence[Rollout]], dropped: Sequence[DroppedGroup] = ()) -> None:
        """Nothing: only numbers are kept here."""

    def note(self, text: str) -> None:
        """Nothing, as above."""

    def _write_all(self) -> None:
        storage.write_bytes(self.uri, "".join(line + "\n" for line in self.lines).encode())


class Observers:
    """Several observers as one, the history that a checkpoint keeps, and the watch over it."""

    def __init__(self, observers: Sequence[Any]):
        self.observers = list(observers)
        self.history: list[Metrics] = []
        self.watch = Watch()

    def restore(self, history: Sequence[Metrics]) -> None:
        self.history, self.watch = list(history), Watch(history)
        for observer in self.observers:
            observer.restore(self.history)

    def step(self, metrics: Metrics) -> None:
        metrics = metrics | self.watch.seen(metrics)
        self.history.append(metrics)
        for observer in self.observers:
            observer.step(metrics)
        self.note(self.watch.notes)

    def rollouts(self, step: int, groups: Sequence[Sequence[Rollout]], dropped: Sequence[DroppedGroup] = ()) -> None:
        for observer in self.observers:
            observer.rollouts(step, groups, dropped)

    def note(self, texts: list[str]) -> None:
        """Pass the notes on, and empty the list."""
        for text in texts:
            for observer in self.observers:
                observer.note(text)
        texts.clear()
