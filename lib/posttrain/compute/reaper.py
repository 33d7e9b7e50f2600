"""Ends what a dead driver left behind. A script of its own, started beside every cluster, free of imports.

Ray's daemons die with the driver, but its agents may linger for minutes, and a user's own
child processes for ever. This process holds the reading end of a pipe; when the driver
ends, in whatever way, the pipe closes, and every process that still carries the
cluster's mark in its environment is killed. Linux only (/proc); elsewhere it does nothing.
"""

import os
import signal
import sys
import time
from pathlib import Path

MARK = "POSTTRAIN_CLUSTER"
"""Environment variable that all processes of one cluster inherit, with a value of its own."""

GRACE_S = 2.0
"""For processes that end by themselves, seconds."""


def marked(value: str, *, name: str = MARK) -> list[int]:
    """Processes, this one excluded, that started with name=value in their environment."""
    wanted = f"{name}={value}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:  # it ended meanwhile, or is another user's
            continue
        if wanted in environment.split(b"\0") and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def main(value: str) -> None:
    """Wait for the end of standard input, then kill until nothing is left."""
    sys.stdin.buffer.read()
    time.sleep(GRACE_S)
    while left := marked(value):
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(GRACE_S)


if __name__ == "__main__":
    main(sys.argv[1])
