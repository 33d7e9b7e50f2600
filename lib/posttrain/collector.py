"""The garbage collector of a process that starts, works and ends: a task of a flow, a command."""

import atexit
import gc


def calm() -> None:
    """Look for garbage more rarely, and not at all at the exit.

    torch, transformers and Ray make half a million objects that stay. With the collector's own thresholds a start
    walks them again and again, and the exit once more.
    """
    gc.set_threshold(50_000, 20, 100)
    atexit.register(gc.freeze)
