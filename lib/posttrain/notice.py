"""One request to stop a process, however many notices of its end come: a second SIGTERM would end it without a save."""

import os
import signal
import threading

_asked = threading.Lock()
"""Held for the rest of the process, which is one attempt of a task."""


def stop_once(why: str) -> None:
    """Send this process SIGTERM with a line on standard error; nothing where that was done before."""
    if _asked.acquire(blocking=False):
        os.write(2, f"{why}\n".encode())
        os.kill(os.getpid(), signal.SIGTERM)
