"""A polite stop: the first SIGTERM or SIGINT is obeyed at a step's end, the second ends the process at once."""

import os
import signal
import threading
from types import FrameType

EXIT_CODE = 75
"""Of a process that saved and stopped as it was asked to, and is to be started again: EX_TEMPFAIL of sysexits.h."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Use as a context manager, after Ray is up (it has a SIGTERM handler of its own); deaf outside the main thread."""

    def __init__(self):
        self.asked: str | None = None
        """Name of the signal that came."""
        self._before = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        os.write(2, f"{self.asked}: saving after this step, then stopping; again ends at once\n".encode())
