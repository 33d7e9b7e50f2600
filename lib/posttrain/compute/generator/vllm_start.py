"""What surrounds the start of a vLLM engine: its neighbours on the GPU, its heap, its kernels for CPUs."""

import fcntl
import gc
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from posttrain.errors import ComputeError


@contextmanager
def starting_alone(device: str) -> Iterator[None]:
    """Wait until no other process of this user is in here that sees the same GPUs; on a CPU, for nobody.

    Engines that share a GPU start one after another, as each measures the memory that is free, which must stand still.
    What stands in this process's heap at the end stays: the garbage collector leaves it alone from then on, which it
    would else look through at every few steps.

    The lock is the kernel's and falls with its holder; how long to wait is the caller's deadline. The GPUs are named by
    CUDA_VISIBLE_DEVICES, since asking CUDA would take memory of them.
    """
    with nullcontext() if device == "cpu" else _alone():
        yield
    gc.collect()
    gc.freeze()


@contextmanager
def _alone() -> Iterator[None]:
    seen = re.sub(r"\W", "_", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    with open(Path(tempfile.gettempdir(), f"posttrain-{os.getuid()}-gpu-{seen}.lock"), "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def keep_weights_unpacked(shape: Any) -> None:
    """vLLM 0.32 packs private copies of linear weights for oneDNN on CPUs; a tied head would keep the old ones after a
    sync, with no error. It also packs experts, in place, and has no switch for that.

    Raises:
        ComputeError: the model, of the text config `shape`, has experts.
    """
    if any(getattr(shape, key, None) for key in ("num_experts", "num_local_experts")):
        raise ComputeError("on a CPU it keeps experts in an order that a sync cannot write; a GPU does not")
    from vllm import _custom_ops  # pyright: ignore

    _custom_ops._supports_onednn = False
