"""Where the seconds of one training step go."""

import time
from collections.abc import Iterator
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

    def metrics(self) -> dict[str, float]:
        """time/<phase>_s of every phase, and time/step_s since the start."""
        named = {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}
        return named | {"time/step_s": time.perf_counter() - self.started}
