"""Where the seconds of one rank's step go, without a wait for the device beside the step's own.

On a GPU the host only queues work, so its clock cannot tell a forward from a backward pass.
The timer records an event at every mark and reads them after the step's one wait.
"""

import time
from typing import Any

import torch


class StepTimer:
    """mark() ... mark(), synced(), mark() ...: the time since the last mark belongs to the name of the next.

    What the host waited for beyond the device's own marks is work that the step before had
    left in the queue: its optimizer. It counts as "optimizer", so that all names add up to
    the seconds of the host.
    """

    def __init__(self, device: torch.device):
        self.on_device = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.marks: list[tuple[str, Any]] = [("", self._now())]
        self.started = time.perf_counter()

    def mark(self, name: str) -> None:
        """Charge the time since the last mark to `name`; a name may come more than once."""
        self.marks.append((name, self._now()))

    def synced(self) -> None:
        """The host has just waited for the device: read the marks; what follows goes by the host's clock."""
        now = time.perf_counter()
        self._read()
        left = max(0.0, now - self.started - sum(self.seconds.values()))
        self._add("optimizer", left)
        self.on_device, self.marks = False, [("", now)]

    def metrics(self) -> dict[str, float]:
        """time/<name>_s of every name, seconds."""
        self._read()
        self.marks = self.marks[-1:]
        return {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}

    def _now(self) -> Any:
        if not self.on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self) -> None:
        for (_, before), (name, after) in zip(self.marks, self.marks[1:], strict=False):
            self._add(name, before.elapsed_time(after) / 1e3 if self.on_device else after - before)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
