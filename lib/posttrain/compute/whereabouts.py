"""Where an actor runs and what it said last, for when it can no longer be asked; and its end."""

import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.compute.out_of_memory import OomCount, killed_since, oom_count

LINES = 20
"""Of a log, from its end."""
READ_BYTES = 64 * 1024
FETCH_S = 10.0
"""For what is read on another node, seconds."""
RAY_MARKS = (":job_id:", ":actor_name:", ":task_name:")
"""Lines that Ray writes into an actor's log for itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """What an actor said of itself when it started."""

    host: str
    pid: int
    node_id: str
    logs: tuple[str, ...]
    """Files of its standard output and error, on its own node."""
    oom: OomCount | None = None
    """What the kernel's out-of-memory killer had done by then."""


def whereabouts(_actor: Any) -> Whereabouts:
    """Of the calling process; runs inside an actor."""
    import ray

    logs = []
    for stream in (1, 2):
        try:
            file = os.readlink(f"/proc/self/fd/{stream}")
        except OSError:  # no /proc on this system
            continue
        if os.path.isfile(file) and file not in logs:
            logs.append(file)
    node_id = ray.get_runtime_context().get_node_id()
    return Whereabouts(host=socket.gethostname(), pid=os.getpid(), node_id=node_id, logs=tuple(logs), oom=oom_count())


def last_words(where: Whereabouts) -> str:
    """The last lines of an actor's log, or why there are none."""
    if not where.logs:
        return "its log is not a file on this system"
    return _on_its_node(where, tail, where.logs, what=f"its log {where.logs[0]}")


def cause_of_death(where: Whereabouts) -> str:
    """What its machine says of a dead actor's end: that the memory was full; empty for nothing."""
    return "" if where.oom is None else _on_its_node(where, killed_since, where.oom, what=where.oom.file)


def end_process(where: Whereabouts) -> None:
    """Kill an actor's process, which may be stopped or hold Python's lock: Ray would ask it to end, and wait."""
    said = _on_its_node(where, _kill, where.pid, what=f"process {where.pid}")
    if said:
        print(f"process {where.pid} on {where.host} was not killed: {said}", flush=True)


def _kill(pid: int) -> str:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return ""  # it has ended
    except PermissionError as error:
        return str(error)
    return ""


def _on_its_node(where: Whereabouts, read: Callable[[Any], str], of: Any, *, what: str) -> str:
    """read(of) on whichever node an actor is on, or why it could not be."""
    if where.host == socket.gethostname():
        return read(of)
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(where.node_id, soft=False)
    remote = ray.remote(read).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    try:
        return ray.get(remote.remote(of), timeout=FETCH_S)
    except RayError as error:
        return f"{what} on {where.host} could not be read: {type(error).__name__}"


def tail(files: Sequence[str]) -> str:
    """The last LINES lines of every file that has any."""
    found = []
    for file in files:
        try:
            with open(file, "rb") as opened:
                opened.seek(max(0, Path(file).stat().st_size - READ_BYTES))
                text = opened.read().decode(errors="replace")
        except OSError as error:
            found.append(f"its log {file} could not be read: {error.strerror}")
            continue
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith(RAY_MARKS)]
        if lines:
            found.append(f"the last lines of its log {file}:")
            found += [f"    {line}" for line in lines[-LINES:]]
    return "\n".join(found) or "its log is empty"
