"""Where a hung group hangs: every living actor writes the stacks of all its threads, and the driver prints them.

A signal makes faulthandler write them, in C and without Python's lock, so a thread that holds it does not keep them
back. A process that is stopped (SIGSTOP) or gone writes nothing, and is named for that.
"""

import faulthandler
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ANSWER_S = 3.0
"""For a process to write its stacks."""
NODE_S = 10.0
"""For a node to tell what its processes wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """An actor's process, and the file its stacks go to."""

    host: str
    node: str
    pid: int
    file: str


def watched(_actor: Any) -> Watched:
    """Run on an actor once: have SIGUSR1 write all stacks of its process into a file."""
    import ray

    file = tempfile.NamedTemporaryFile("w", prefix="posttrain-stacks-", delete=False)  # noqa: SIM115  (stays open)
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
    _files.append(file)
    node = ray.get_runtime_context().get_node_id()
    return Watched(host=socket.gethostname(), node=node, pid=os.getpid(), file=file.name)


_files: list[Any] = []
"""faulthandler keeps the descriptor's number only."""


def print_stacks(group: str, watching: Sequence[Any]) -> str:
    """Print to standard error what every actor is doing; return where they run, and who does not answer.

    Args:
        watching: Ray's references to what watched() returned, in rank order.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ready, _ = ray.wait(list(watching), num_returns=len(watching), timeout=1)
    ask = ray.remote(num_cpus=0, max_retries=0)(_stacks)
    asked: dict[int, tuple[Watched, Any]] = {}
    for rank, reference in enumerate(watching):
        if reference in ready:
            actor: Watched = ray.get(reference)
            strategy = NodeAffinitySchedulingStrategy(actor.node, soft=False)
            asked[rank] = actor, ask.options(scheduling_strategy=strategy).remote(actor)
    ray.wait([reference for _, reference in asked.values()], num_returns=max(1, len(asked)), timeout=NODE_S)
    found = []
    for rank, (actor, reference) in asked.items():
        text = ray.get(reference) if ray.wait([reference], timeout=0)[0] else ""
        shown = text or "does not answer: it is stopped, or its machine is"
        print(f"--- {group} {rank}, process {actor.pid} on {actor.host}:\n{shown}", file=sys.stderr, flush=True)
        found.append(f"{group} {rank} is process {actor.pid} on {actor.host}{'' if text else ' and does not answer'}")
    return f" ({'; '.join(found)}; stacks of all are in the log)" if found else ""


def _stacks(actor: Watched) -> str:
    """Run on the actor's node: its stacks, or "" where the process does not write them."""
    path = Path(actor.file)
    before = path.stat().st_size
    try:
        os.kill(actor.pid, signal.SIGUSR1)
    except ProcessLookupError:
        return "is gone"
    ends, size = time.monotonic() + ANSWER_S, before
    while time.monotonic() < ends:
        time.sleep(0.2)
        grown = path.stat().st_size
        if grown == size > before:
            break
        size = grown
    return path.read_text()[before:]
