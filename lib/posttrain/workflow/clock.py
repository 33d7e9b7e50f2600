"""Where the seconds of one training step go, and when it is time to save."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Clock:
    """Adds up the seconds of named phases, from the moment it is made."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside as `name`; a name may come more than once, phases do not nest."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def move(self, source: str, target: str, seconds: float) -> None:
        """Count seconds of one phase to another, as many of them as it has."""
        seconds = min(seconds, self.seconds[source])
        self.seconds[source] -= seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds

    def metrics(self, measured: Mapping[str, float]) -> dict[str, float]:
        """time/<phase>_s of every phase, time/other_s, and time/step_s since the start: what all others add up to.

        Args:
            measured: metrics whose time/* were taken inside the step and outside all phases.
        """
        step = time.perf_counter() - self.started
        named = {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}
        elsewhere = sum(seconds for name, seconds in measured.items() if name.startswith("time/"))
        other = max(0.0, step - sum(named.values()) - elsewhere)
        return named | {"time/other_s": other, "time/step_s": step}


class SaveClock:
    """When a checkpoint is due: after so many steps or so much time, whichever comes first, and at the end.

    Args:
        every_steps: None goes by time alone.
        every_seconds: since the last save, or since this was made.
    """

    def __init__(self, *, num_steps: int, every_steps: int | None, every_seconds: float):
        self.num_steps, self.every_steps, self.every_seconds = num_steps, every_steps, every_seconds
        self.last = time.monotonic()

    def due(self, done: int) -> bool:
        """Whether to save after `done` steps; counts as saved."""
        by_steps = bool(self.every_steps and done % self.every_steps == 0)
        if not (by_steps or done == self.num_steps or time.monotonic() - self.last > self.every_seconds):
            return False
        self.last = time.monotonic()
        return True
