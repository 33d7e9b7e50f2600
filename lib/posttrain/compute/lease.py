"""One writer at a time under a checkpoint root: a lease with a fencing token.

lease.json holds a token that only grows, who holds it, and a count of renewals. A live holder renews it every
RENEW_S; whoever wants it watches the count by a clock of its own, so that no two machines have to agree on the time:
a count that moves is a live writer, and a refusal; one that stands still for EXPIRE_S is a dead one, and its lease is
taken over under the next token. A holder on the same machine whose process is gone is known to be dead at once.

A commit happens only under the current token. On disk a file lock is held over the check and the rename, so a writer
that was paused and overtaken cannot commit. On S3, where there is no lock, the lease changes by conditional puts and
the commit itself is one: between its check and its put a request's time remains, and what an overtaken writer might
put then is a whole checkpoint of the same run that the current writer replaces.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain import s3, storage
from posttrain.errors import CheckpointError, PosttrainError

RENEW_S = 10.0
EXPIRE_S = 60.0
"""Six renewals missed."""
LOCK_S = 60.0
"""Longest wait for the file lock, which is held for a rename's time."""


class Lease:
    """The right to write under `root`, from acquire() to release()."""

    def __init__(self, root: str, *, renew_s: float = RENEW_S, expire_s: float = EXPIRE_S):
        self.root, self.uri = root, storage.join(root, "lease.json")
        self.renew_s, self.expire_s = renew_s, expire_s
        self.token = 0
        self.lost: str | None = None
        """Why this process may no longer write."""
        self._content: dict[str, Any] = {}
        self._version = ""
        self._stop, self._mutex = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease, and renew it in a thread from then on.

        Raises:
            CheckpointError: another process holds it; names it.
        """
        found = self._read()
        if found and not found["released"] and not _is_dead(found["owner"]):
            self._wait_for_silence(found)
        owner = _me()
        self._content = {"token": (found["token"] if found else 0) + 1, "owner": owner, "renewed": 0, "released": False}
        with self._locked():
            now = self._read()
            if (now and now["token"]) != (found and found["token"]) or not self._write(first=now is None):
                raise CheckpointError(f"{self.root}: another process took the lease just now: {self._shown()}")
        self.token = self._content["token"]
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self._thread.start()

    def release(self) -> None:
        """Let the next writer in without a wait."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self.lost is not None:
            return
        self._content["released"] = True
        try:
            self._update()
        except (OSError, PosttrainError) as error:  # often the very fault that ends the run, which must be heard
            print(f"{self.uri} could not be released, so the next writer watches it for a minute: {error}", flush=True)

    @contextmanager
    def committing(self) -> Iterator[None]:
        """What is done inside is done under the current token, or not at all.

        Raises:
            CheckpointError: another process has taken over; names it.
        """
        with self._locked():
            found = self._read()
            if not found or found["owner"]["nonce"] != self._content["owner"]["nonce"]:
                self.lost = f"{self.root}: lease {self.token} of this process was taken over by {self._shown()}"
            self.check()
            yield

    def check(self) -> None:
        """Raises CheckpointError once it is known that another process has taken over."""
        if self.lost:
            raise CheckpointError(f"{self.lost}; this process was taken for dead and may not commit any more")

    def _wait_for_silence(self, found: dict[str, Any]) -> None:
        print(f"{self.root} is held by {_name(found['owner'])}; watching whether it is alive", flush=True)
        ends = time.monotonic() + self.expire_s
        while time.monotonic() < ends:
            time.sleep(min(1.0, self.renew_s / 4))
            now = self._read()
            if not now or now["released"]:
                return
            if (now["token"], now["renewed"]) != (found["token"], found["renewed"]):
                raise CheckpointError(
                    f"{self.root} is being written by {_name(now['owner'])}, under lease {now['token']}. "
                    "Fix: let that run end, or end it, and start this one again"
                )

    def _renew(self) -> None:
        while not self._stop.wait(self.renew_s):
            self._content["renewed"] += 1
            try:
                with self._locked():
                    found = self._read()
                    mine = found is not None and found["owner"]["nonce"] == self._content["owner"]["nonce"]
                    if not mine or not self._write(first=False):
                        self.lost = f"{self.root}: lease {self.token} of this process was taken over by {self._shown()}"
                        return
            except Exception as error:  # a store in trouble; the commit will look again and fail in the open
                print(f"{self.uri} could not be renewed: {error}", flush=True)

    def _update(self) -> None:
        with self._locked():
            found = self._read()
            if found and found["owner"]["nonce"] == self._content["owner"]["nonce"]:
                self._write(first=False)

    def _shown(self) -> str:
        found = self._read()
        return f"{_name(found['owner'])}, lease {found['token']}" if found else "nobody: lease.json is gone"

    def _read(self) -> dict[str, Any] | None:
        if not storage.exists(self.uri):
            return None
        if storage.is_s3(self.uri):
            data, self._version = s3.get_object(self.uri)
        else:
            data = storage.read_bytes(self.uri)
        try:
            found = json.loads(data)
            return {"token": int(found["token"]), **{key: found[key] for key in ("owner", "renewed", "released")}}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.uri} is damaged: {error!r}; remove it once no run writes here") from None

    def _write(self, *, first: bool) -> bool:
        """Whether it was written: on S3 not if another process changed it since it was read."""
        data = json.dumps(self._content).encode()
        if storage.is_s3(self.uri):
            return s3.put_object(self.uri, data, replaces=None if first else self._version)
        storage.write_bytes(self.uri, data)
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among this process's threads and, on disk, among all processes: a file lock falls with its holder."""
        with self._mutex:
            if storage.is_s3(self.uri):
                yield
                return
            with file_lock(Path(self.root, "lease.lock")):
                yield


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Alone among the processes that lock this file; the lock falls with its holder.

    Raises:
        CheckpointError: another process holds it for longer than LOCK_S.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + LOCK_S
    with open(path, "ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > ends:
                    raise CheckpointError(f"{path} is locked by another process that does not let go") from None
                time.sleep(0.05)
        yield


def _me() -> dict[str, Any]:
    """This process, so that another on the same machine can tell whether it lives."""
    return {
        "nonce": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": _machine(),
        "started": _started(os.getpid()),
        "run": os.environ.get("MF_PATHSPEC", ""),
    }


def _name(owner: dict[str, Any]) -> str:
    run = f" ({owner['run']})" if owner["run"] else ""
    return f"process {owner['pid']} on {owner['host']}{run}"


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether the owner is known to be gone; only of a process of this machine can that be known."""
    return bool(owner["machine"]) and owner["machine"] == _machine() and _started(owner["pid"]) != owner["started"]


def _machine() -> str:
    """Equal for processes that see each other's numbers; empty where that cannot be told (no /proc)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in ticks since the machine did; empty for none, and for one that is only still listed."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]
