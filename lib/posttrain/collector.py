"""The garbage collector of a process that starts, works and ends: a task of a flow, a command."""

import atexit
import gc


def calm() -> None:
    """Look for garbage more rarely, and not at all at the exit.

    torch, transformers and Ray make half a million objects that stay. With the collector's own thresholds a start
    walks them again and again, an eighth of its processor time (2 cores of a virtual machine, Python 3.11), and the
    exit for over a second more.
    """
    gc.set_threshold(50_000, 20, 100)
    atexit.register(gc.freeze)
