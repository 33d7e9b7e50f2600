"""Whether the kernel's out-of-memory killer ended a process: SIGKILL does not say who sent it, the kernel's count does.

Every memory cgroup counts the processes of it that the killer ended. What the count was when a process started goes
with its Whereabouts, and is compared once it is dead. Version 1 and 2 of cgroups keep it under different names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUPS = "/sys/fs/cgroup"
PROC_CGROUP = "/proc/self/cgroup"


@dataclass(frozen=True, slots=True)
class OomCount:
    """How many processes of a cgroup the killer has ended."""

    file: str
    kills: int


def oom_count() -> OomCount | None:
    """Of the calling process's memory cgroup, now; None where the system keeps no count that can be read."""
    for file in _files():
        kills = _kills(file)
        if kills is not None:
            return OomCount(str(file), kills)
    return None


def killed_since(before: OomCount) -> str:
    """What the killer did since then, in a sentence for the report of a death; empty for nothing."""
    now = _kills(Path(before.file))
    if now is None or now <= before.kills:
        return ""
    return (
        f"out of host memory: since it started, the kernel's out-of-memory killer has ended {now - before.kills} "
        f"process(es) of its cgroup ({before.file}: oom_kill {before.kills} -> {now}). "
        "Fix: raise parallel.memory_gib, or run fewer ranks on a node"
    )


def _files() -> Iterator[Path]:
    """Where the count may be: in the folder of the process's cgroup or, in a container that sees no other, the root."""
    try:
        lines = Path(PROC_CGROUP).read_text().splitlines()
    except OSError:  # no /proc on this system
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):  # version 1
            for folder in (Path(CGROUPS, "memory", path.lstrip("/")), Path(CGROUPS, "memory")):
                yield folder / "memory.oom_control"
        elif not controllers:  # version 2
            for folder in (Path(CGROUPS, path.lstrip("/")), Path(CGROUPS)):
                yield folder / "memory.events"


def _kills(file: Path) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("oom_kill ")]
    return int(found[0]) if found else None
