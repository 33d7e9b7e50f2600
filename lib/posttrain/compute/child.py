"""A plain child process that holds one object and answers calls to it; killed with everything that it started.

Where foreign code runs (rewards, environments): it may raise, hang, die, or start processes that hang, and none
of it reaches this process. Calls and answers are JSON lines over two pipes, so nothing is unpickled.
child_main.py is the other end. A child ends with its event loop at the latest.
"""

import asyncio
import itertools
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from posttrain import errors
from posttrain.compute.pool import Pool, environment
from posttrain.compute.reaper import marked
from posttrain.deadline import within
from posttrain.errors import ComputeError, WorkerDiedError

MARK = "POSTTRAIN_CHILD"
"""Environment variable that a child's own children inherit, with a value of its own: a process that left the
process group is still found by it (Linux)."""

LONGEST_LINE = 2**30
"""Bytes of one answer; more is a mistake."""

END_SECONDS = 5.0
"""For the end of a process that has been killed."""


class Child:
    """An object in a process of its own. Made by Child.start(), in a running event loop."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, mark: str):
        self.name, self.process, self.mark = name, process, mark
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._reader = asyncio.create_task(self._read())  # cancelled with its loop: then too the process is killed

    @staticmethod
    async def start(name: str, cls: str, arguments: Mapping[str, Any], *, timeout_s: float) -> "Child":
        """Start a process and make the object.

        Args:
            name: what people read when it fails: "reward 0".
            cls: import path of the class.
            arguments: its keyword arguments, plain values.

        Raises:
            ComputeError: the constructor failed, or did not end in `timeout_s`. An error of ours is raised as it is.
        """
        mark = uuid.uuid4().hex
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "posttrain.compute.child_main"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | environment(Pool()) | {MARK: mark},
            start_new_session=True,
            limit=LONGEST_LINE,
        )
        child = Child(name, process, mark)
        try:
            await child.call("make", cls, dict(arguments), timeout_s=timeout_s)
        except Exception:
            child.kill()
            raise
        return child

    @property
    def alive(self) -> bool:
        """Whether it still answers calls."""
        return not self._reader.done() and not self._reader.cancelling()

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method with plain values; several calls may wait at once, where the methods are coroutines.

        Raises:
            DeadlineError: no answer in `timeout_s`; the process still runs, see kill().
            WorkerDiedError: the process ended.
            ComputeError: the method raised; an error of ours is raised as it is.
        """
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            return await within(timeout_s, f"{self.name}: {method}()", self._exchange(number, method, args, answer))
        finally:
            self._waiting.pop(number, None)

    def kill(self) -> None:
        """End the process and all that it started, now."""
        self._reader.cancel()
        kill_all(self.process.pid, self.mark)

    async def _exchange(self, number: int, method: str, args: tuple, answer: asyncio.Future[Any]) -> Any:
        if self._reader.done():
            raise WorkerDiedError(f"{self.name} died before {method}(): {self._ending()}")
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"number": number, "method": method, "args": args}).encode() + b"\n")
        with suppress(ConnectionError):  # it died, and the reader says so
            await self.process.stdin.drain()
        reply = await answer
        if reply is None:
            raise WorkerDiedError(f"{self.name} died during {method}(): {self._ending()}")
        if "value" in reply:
            return reply["value"]
        kind, text = reply["error"]
        known = getattr(errors, kind, None)
        if isinstance(known, type) and issubclass(known, errors.PosttrainError):
            raise known(text)
        raise ComputeError(f"{self.name}: {method}() raised {kind}: {text}")

    async def _read(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            while line := await self.process.stdout.readline():
                reply = json.loads(line)
                if not (future := self._waiting.get(reply["number"])) or future.done():
                    continue  # of a call that nobody waits for any more
                future.set_result(reply)
        finally:
            kill_all(self.process.pid, self.mark)
            self.process.stdin.close()
            await self._gone(self.process.stdout)
            for future in self._waiting.values():
                if not future.done():
                    future.set_result(None)

    async def _gone(self, stdout: asyncio.StreamReader) -> None:
        """Wait until the process, which has been killed, has ended and its pipes are closed, whatever cancels this
        meanwhile: what is left of them when the event loop closes would complain to it later."""
        end = time.monotonic() + END_SECONDS
        while True:
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    await self.process.wait()
                    while await stdout.read(2**16):
                        pass
            except TimeoutError:
                print(f"WARNING: {self.name}, process {self.process.pid}, does not end", flush=True)
            except asyncio.CancelledError:
                continue  # its end is all that is left to do
            return

    def _ending(self) -> str:
        code = self.process.returncode
        if code is None or code >= 0:
            return f"exit status {code}"
        return f"killed by {signal.Signals(-code).name}"


def kill_all(group: int, mark: str) -> None:
    """Kill a process group, and every process with the mark that has left it."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    while left := marked(mark, name=MARK):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
