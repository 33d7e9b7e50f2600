"""Engines that share a GPU start one after another: each measures the memory that is free, which must stand still."""

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def starting_alone(device: str) -> Iterator[None]:
    """Wait until no other process of this user is in here that sees the same GPUs; on a CPU, for nobody.

    The lock is the kernel's and falls with its holder; how long to wait is the caller's deadline. The GPUs are named by
    CUDA_VISIBLE_DEVICES, since asking CUDA would take memory of them.
    """
    if device == "cpu":
        yield
        return
    seen = re.sub(r"\W", "_", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    with open(Path(tempfile.gettempdir(), f"posttrain-{os.getuid()}-gpu-{seen}.lock"), "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
