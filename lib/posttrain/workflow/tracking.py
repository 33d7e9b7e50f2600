"""A run's metrics in an experiment tracker, beside the JSONL file that always has them.

Each tracker lives on a thread of its own behind a bounded queue: one that is slow, hangs or
fails costs points, which are counted, and never a step. A tracker that could not start is
tried again and then gets what it missed.
"""

import contextlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

from posttrain.data.types import Rollout
from posttrain.workflow.evaluate import last_user_text
from posttrain.workflow.observers import Metrics
from posttrain.workflow.rollouts import DroppedGroup

Status = Literal["finished", "failed"]
QUEUED = 1000
"""Steps that a slow tracker may lag behind."""
FINISH_S = 30.0
"""For a tracker to take what is queued when the run ends, seconds."""
RETRY_S = 60.0
"""Between attempts to start a tracker that failed to, seconds."""
TEXT_EVERY_S = 60.0
"""Between two samples of rollouts, seconds."""
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a tracker is told of a run; nothing in it is secret."""

    run_id: str
    """Of this phase of this run, the same in every attempt: letters, digits, -, _ and . only."""
    name: str
    """For people."""
    folder: str
    """Folder or s3:// prefix of the run's files."""
    config: dict[str, Any]
    first_step: int
    """Of this attempt; steps before it were logged by an earlier one, later ones may have been."""


class Tracker(Protocol):
    """What a user's own tracker implements. Every method is called on one thread, in order."""

    def start(self, facts: RunFacts) -> int:
        """Open the run, or the one of that run_id again; return the first step that it has not or overwrites."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step's floats, named noun/stat. Steps ascend and none comes twice."""
        ...

    def text(self, step: int, name: str, text: str) -> None:
        """Markdown that belongs to a step."""
        ...

    def finish(self, status: Status) -> None:
        """Deliver what is left and close."""
        ...


class Tracking:
    """An observer that passes everything on to one tracker.

    Args:
        label: what people call the tracker.
        facts: of the run; first_step is set when the history is known.
    """

    def __init__(self, label: str, tracker: Tracker, facts: RunFacts):
        self.label, self.tracker, self.facts = label, tracker, facts
        self.counts = {"logged": 0, "failed": 0, "dropped": 0}
        self.rows: list[Metrics] = []
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(QUEUED)
        self._thread = threading.Thread(target=self._run, name=f"tracker-{label}", daemon=True)
        self._next, self._tried, self._warned, self._texted = -1, 0.0, False, 0.0

    def restore(self, history: Sequence[Metrics]) -> None:
        """Begin, after the steps of an earlier attempt."""
        self.rows = list(history)
        self.facts = replace(self.facts, first_step=len(history))
        self._thread.start()

    def step(self, metrics: Metrics) -> None:
        self.rows.append(metrics)
        self._put("step", metrics)

    def rollouts(self, step: int, groups: Sequence[Sequence[Rollout]], dropped: Sequence[DroppedGroup] = ()) -> None:
        """One completion of the first group, at most once in TEXT_EVERY_S."""
        if groups and time.monotonic() - self._texted >= TEXT_EVERY_S:
            self._texted = time.monotonic()
            rollout = groups[0][0]
            said = f"{last_user_text(rollout.prompt.row)}\n\n**{rollout.reward}**\n\n{rollout.text}"
            self._put("text", (step, "rollout", said))

    def note(self, text: str) -> None:
        self._put("text", (len(self.rows), "note", text))

    def close(self, status: Status) -> None:
        """End in bounded time, whatever the tracker does."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(("finish", status), timeout=FINISH_S)
            self._thread.join(FINISH_S)
        if self._thread.is_alive():
            self.counts["dropped"] += sum(kind == "step" for kind, _ in list(self._queue.queue))
            self._warn(f"did not take what was left within {FINISH_S:g} s")
        if self.counts["failed"] or self.counts["dropped"]:
            counts = ", ".join(f"{n} {name}" for name, n in self.counts.items())
            print(f"tracking.{self.label}: steps {counts}; the metrics file has all", flush=True)

    def _put(self, kind: str, item: Any) -> None:
        try:
            self._queue.put_nowait((kind, item))
        except queue.Full:
            self.counts["dropped"] += kind == "step"
            self._warn(f"lags {QUEUED} steps behind; points are dropped")

    def _run(self) -> None:
        """The tracker's thread."""
        self._start()
        while True:
            kind, item = self._queue.get()
            if self._next < 0 and (kind == "finish" or time.monotonic() - self._tried > RETRY_S):
                self._start()
            if kind == "finish":
                if self._next >= 0:
                    self._try(partial(self.tracker.finish, item))
                return
            if kind == "step":
                self._log(item)
            elif self._next >= 0:
                self._try(partial(self.tracker.text, *item))

    def _start(self) -> None:
        """Open the tracker, and hand it the finished steps that it lacks; those still queued are then skipped."""
        self._tried = time.monotonic()
        first: list[int] = []
        if not self._try(lambda: first.append(self.tracker.start(self.facts))):
            return
        self._next = first[0]
        self.counts |= {"failed": 0, "dropped": 0}  # it gets now what it missed
        for row in list(self.rows):
            self._log(row)

    def _log(self, row: Metrics) -> None:
        step = int(row["step"])
        if self._next < 0:
            self.counts["failed"] += 1
        elif step >= self._next:
            self._next = step + 1
            done = self._try(partial(self.tracker.log, step, {k: v for k, v in row.items() if k != "step"}))
            self.counts["logged" if done else "failed"] += 1

    def _try(self, call: Callable[[], Any]) -> bool:
        try:
            call()
        except Exception as error:
            self._warn(f"{type(error).__name__}: {without_secrets(str(error))}")
            return False
        return True

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            print(f"tracking.{self.label}: {what}. Training goes on; its metrics file has everything", flush=True)


@contextmanager
def tracked(trackers: Mapping[str, Tracker], facts: RunFacts) -> Iterator[list[Tracking]]:
    """Observers of a run, one a tracker (label -> tracker); they end with the block, as it did."""
    observers = [Tracking(label, tracker, facts) for label, tracker in trackers.items()]
    status: Status = "failed"
    try:
        yield observers
        status = "finished"
    finally:
        for observer in observers:
            observer.close(status)


def without_secrets(text: str) -> str:
    """A text without the passwords of URLs and without what the environment keeps under a secret's name."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    return re.sub(r"://[^/\s@]+@", "://***@", text)
