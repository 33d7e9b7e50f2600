"""Actors that need no torch, so that their processes start fast."""

import os
import signal
import time
from pathlib import Path

from posttrain.compute import out_of_memory
from posttrain.errors import DataError


class Worker:
    def __init__(self, rank: int):
        self.rank = rank

    def pid(self) -> int:
        return os.getpid()

    def add(self, number: int) -> int:
        return number + self.rank

    def threads(self) -> str:
        return os.environ["OMP_NUM_THREADS"]

    def refuse(self) -> None:
        raise DataError("row 7 is empty")

    def times_out_itself(self) -> None:
        raise TimeoutError("the verifier's own")

    def sees_gpus(self) -> str:
        return os.environ["CUDA_VISIBLE_DEVICES"]

    def fail(self) -> None:
        raise ZeroDivisionError("oops")

    def sleep(self) -> None:
        print("waiting for a lock", flush=True)
        time.sleep(600)

    def die(self) -> None:
        print("about to load shard 7", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def rank_1_dies_and_the_others_fail(self) -> None:
        if self.rank == 1:
            time.sleep(0.5)
            self.die()
        raise RuntimeError("connection closed by peer")


class Starved(Worker):
    """Lives in a folder that looks like a cgroup, where it dies as the kernel lets a process die that took too much."""

    def __init__(self, rank: int, cgroups: str):
        super().__init__(rank)
        self.events = Path(cgroups, "memory.events")
        Path(cgroups, "self").write_text("0::/\n")
        self.events.write_text("oom_kill 0\n")
        out_of_memory.CGROUPS, out_of_memory.PROC_CGROUP = cgroups, f"{cgroups}/self"

    def take_too_much(self) -> None:
        self.events.write_text("oom_kill 1\n")
        self.die()


class Crowded(Worker):
    """Lives in a real cgroup, which has less memory than it takes."""

    def __init__(self, rank: int, cgroup: str):
        super().__init__(rank)
        Path(cgroup, "cgroup.procs").write_text(str(os.getpid()))

    def take_too_much(self) -> int:
        return len(bytearray(1 << 30))


class Unstartable:
    def __init__(self):
        raise MemoryError("no room for the model")

    def pid(self) -> int:
        return os.getpid()
