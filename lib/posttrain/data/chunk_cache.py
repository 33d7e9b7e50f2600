"""Chunks of S3 objects kept on the local disk, for data that is read in more than one epoch.

In: a range of an object, by its uri and ETag. Out: its bytes, or None. An entry carries a checksum and
a damaged one counts as absent, so the cache can lose time but never change a byte. Any number of
processes may use one folder: entries appear by a rename, and the least recently used ones leave.
"""

import contextlib
import hashlib
import os
import re
import struct
import threading
import time
import uuid
import warnings
import zlib
from pathlib import Path

from posttrain.data.get_range import Range


class ChunkCache:
    """A folder of chunks of at most `max_bytes`; files there that are not the cache's are left alone.

    A process looks at what others wrote after every sixteenth of `max_bytes` of its own; with several at work the
    folder may pass `max_bytes` by that and one chunk for each of them.
    A disk that cannot be written (full, read-only) stops the writing, with one warning, never the run.
    """

    def __init__(self, folder: str | Path, max_bytes: int):
        self._folder, self._max_bytes = Path(folder).expanduser(), max_bytes
        self._lock = threading.Lock()
        self._used = max_bytes  # unknown: the first put looks
        self._unseen = 0  # bytes written since this process last looked
        self._writes = True

    def get(self, wanted: Range) -> bytes | None:
        """The bytes of a range, or None; a damaged entry is removed."""
        path = self._folder / _name(wanted)
        try:
            entry = path.read_bytes()
            now = time.time_ns()
            os.utime(path, ns=(now, now))
        except OSError:
            return None  # absent, just evicted by another process, or not to be read: fetched again
        data = entry[_HEADER.size :]
        if len(data) == wanted.last - wanted.first + 1 and entry[: _HEADER.size] == _header(path.name, data):
            return data
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def put(self, wanted: Range, data: bytes) -> None:
        """Keep the bytes of a range, if they fit; the least recently used entries make room."""
        num_bytes = _HEADER.size + len(data)
        if not self._writes or num_bytes > self._max_bytes:
            return
        path = self._folder / _name(wanted)
        part = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._make_room(num_bytes)
            try:
                with open(part, "wb") as file:
                    file.write(_header(path.name, data))
                    file.write(data)
                now = time.time_ns()
                os.utime(part, ns=(now, now))  # the kernel's own stamps are too coarse to order entries
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        except FileNotFoundError:
            return  # another process took the part of this slow writer, or the folder, away: kept the next time
        except OSError as error:
            self._give_up(error)

    def _make_room(self, num_bytes: int) -> None:
        """Remove the least recently used entries, of all processes, until `num_bytes` fit."""
        with self._lock:
            self._used += num_bytes
            self._unseen += num_bytes
            if self._used <= self._max_bytes and self._unseen <= self._max_bytes // 16:
                return
            entries = sorted(_entries(self._folder))
            self._used, self._unseen = sum(size for _, size, _ in entries) + num_bytes, 0
            goal = self._max_bytes if self._used <= self._max_bytes else self._max_bytes * 15 // 16
            for _, size, path in entries:
                if self._used <= max(goal, num_bytes):
                    return
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    os.unlink(path)
                self._used -= size

    def _give_up(self, error: OSError) -> None:
        with self._lock:
            first, self._writes = self._writes, False
        if first:
            warnings.warn(
                f"{self._folder}: cannot keep chunks here ({error.strerror}); going on without. "
                "Fix: free space there, or name another folder",
                RuntimeWarning,
                stacklevel=2,
            )


_HEADER = struct.Struct("<IQ")
_NAME = re.compile(r"[0-9a-f]{64}\.chunk(\.tmp-[0-9a-f]{12})?")


def _name(wanted: Range) -> str:
    key = f"{wanted.uri}\n{wanted.etag}\n{wanted.size}\n{wanted.first}\n{wanted.last}"
    return hashlib.sha256(key.encode()).hexdigest() + ".chunk"


def _header(name: str, data: bytes) -> bytes:
    """CRC-32 over name and data, so that an entry under another's name is refused too; bytes of data."""
    return _HEADER.pack(zlib.crc32(data, zlib.crc32(name.encode())), len(data))


def _entries(folder: Path) -> list[tuple[int, int, str]]:
    """Last use (ns), size (bytes) and path of each file of the cache, those that a killed writer left included."""
    found = []
    with os.scandir(folder) as listing:
        for entry in listing:
            if _NAME.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):  # evicted while we look
                    stat = entry.stat()
                    found.append((stat.st_mtime_ns, stat.st_size, entry.path))
    return found
