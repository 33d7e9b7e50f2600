"""Random access to one S3 object: a seekable file over chunks, each one ranged GET.

In: an object as it was listed. Out: its bytes, in any order, from any thread. Chunks that were read
last stay in memory, the next ones are fetched ahead by threads that all files of the process share,
and a reader joins a fetch that is under way instead of repeating it.
"""

import io
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING

from posttrain.data.chunk_cache import ChunkCache
from posttrain.data.get_range import PATIENCE, Patience, Range, get_range
from posttrain.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHUNK_BYTES = 4 * 1024 * 1024
MEMORY_CHUNKS = 32
"""Half of them may be fetched ahead: a group of order.py's BlockOrder fits."""
READ_AHEAD_CHUNKS = 2
READ_AHEAD_THREADS = 8


class RangedFile(io.RawIOBase):
    """An S3 object as a read-only seekable file; reads are whole, short only at its end.

    Holds at most `memory_chunks` chunks of `chunk_bytes`, and half as many again under way. Chunks begin at every
    multiple of `chunk_bytes`, or at `starts` (ascending, from 0), so that who reads certain blocks fetches no more.
    Threads may share it: `read_at` has no position; `read` and `seek` share one, as pyarrow's PythonFile expects,
    which locks around them. Open it in the process that reads: it does not survive a fork.

    Every read raises DataError when the object changed since it was listed, or cannot be had (see get_range).
    """

    def __init__(
        self,
        uri: str,
        *,
        size: int,
        etag: str,
        cache: ChunkCache | None = None,
        patience: Patience = PATIENCE,
        chunk_bytes: int = CHUNK_BYTES,
        memory_chunks: int = MEMORY_CHUNKS,
        starts: Sequence[int] | None = None,
    ):
        super().__init__()
        self.uri, self.size, self.name = uri, size, uri
        self._etag, self._cache, self._patience = etag, cache, patience
        self._starts: Sequence[int] = starts or range(0, max(size, 1), chunk_bytes)
        self._memory_chunks = max(memory_chunks, 1)
        self._position = 0
        self._sequential_at = 0  # where a read must start to continue the one before
        self._lock = threading.Lock()
        self._chunks: OrderedDict[int, bytes] = OrderedDict()  # least recently used first
        self._under_way: dict[int, Future[bytes]] = {}
        self._stop = threading.Event()

    def read_at(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`, fewer at the end of the file; the file's position stays."""
        self._refuse_closed()
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        wanted = self._numbers(offset, end)
        ahead = READ_AHEAD_CHUNKS if offset == self._sequential_at else 0
        self._sequential_at = end
        pieces = []
        for number in wanted:
            self._start(range(number + 1, wanted.stop + ahead))
            start = self._starts[number]
            pieces.append(memoryview(self._chunk(number))[max(offset - start, 0) : end - start])
        return b"".join(pieces)

    def prefetch(self, offset: int, length: int) -> None:
        """Start to fetch a range and return at once. A hint: what does not fit in half the memory is left out."""
        self._refuse_closed()
        end = min(offset + length, self.size)
        if offset < end:
            self._start(self._numbers(offset, end))

    def drop(self, offset: int, length: int) -> None:
        """Forget a range that will not be read again soon: chunks that begin in it."""
        with self._lock:
            for number in self._numbers(offset, offset + length):
                if self._starts[number] >= offset:
                    self._chunks.pop(number, None)

    def read(self, size: int | None = -1, /) -> bytes:
        """`size` bytes from the position, all that is left when negative or None."""
        left = max(self.size - self._position, 0)
        data = self.read_at(self._position, left if size is None or size < 0 else size)
        self._position += len(data)
        return data

    def readall(self) -> bytes:
        """All that is left."""
        return self.read()

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Fill a buffer from the position; returns the bytes written."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def readline(self, size: int | None = -1, /) -> bytes:
        """The next line, its newline included. (The inherited one would read byte by byte.)"""
        limit = self.size if size is None or size < 0 else min(self._position + size, self.size)
        line = b""
        while self._position < limit and not line.endswith(b"\n"):
            _, end_of_chunk = self._span(self._numbers(self._position, self._position + 1).start)
            step = min(end_of_chunk - self._position, limit - self._position, max(_LINE_BYTES, len(line)))
            piece = self.read_at(self._position, step)
            piece = piece[: piece.find(b"\n") + 1 or None]
            self._position += len(piece)
            self._sequential_at = self._position
            line += piece
        self._refuse_closed()
        return line

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the position, also past the end; returns it."""
        self._refuse_closed()
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if position < 0:
            raise ValueError(f"{self.uri}: cannot seek to {position}, before the start")
        self._position = position
        return position

    def tell(self) -> int:
        """The position."""
        self._refuse_closed()
        return self._position

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def close(self) -> None:
        """Give up what is fetched ahead and forget the chunks."""
        if not self.closed:
            self._stop.set()
            with self._lock:
                for future in self._under_way.values():
                    future.cancel()
                self._under_way.clear()
                self._chunks.clear()
        super().close()

    def _refuse_closed(self) -> None:
        if self.closed:
            raise ValueError(f"{self.uri}: read of a closed file")

    def _numbers(self, offset: int, end: int) -> range:
        return range(bisect_right(self._starts, offset) - 1, bisect_right(self._starts, end - 1))

    def _span(self, number: int) -> tuple[int, int]:
        """Where a chunk begins, and where it ends."""
        return self._starts[number], self._starts[number + 1] if number + 1 < len(self._starts) else self.size

    def _start(self, numbers: range) -> None:
        """Fetch chunks ahead, at most half of what memory holds: more would push out chunks before they are read."""
        half = self._memory_chunks // 2
        with self._lock:
            for number in numbers[:half]:
                if len(self._under_way) >= half or number >= len(self._starts):
                    return
                if number not in self._chunks and number not in self._under_way:
                    self._under_way[number] = _read_ahead_pool(os.getpid()).submit(self._load, number)

    def _chunk(self, number: int) -> bytes:
        """One chunk: from memory, from the fetch that is under way, or fetched in this thread."""
        with self._lock:
            if data := self._chunks.get(number):
                self._chunks.move_to_end(number)
                return data
            future = self._under_way.get(number)
            if future and not future.cancel():  # what still waits for a thread is not waited for
                mine = None
            else:
                future = mine = self._under_way[number] = Future()
                mine.set_running_or_notify_cancel()
        if mine:
            try:
                mine.set_result(self._load(number))
            except Exception as error:
                mine.set_exception(error)
            finally:
                if not mine.done():  # an interrupt of this thread must not leave the others waiting
                    mine.set_exception(DataError(f"{self.uri}: the read was interrupted"))
        return future.result()

    def _load(self, number: int) -> bytes:
        try:
            data = self._cached_or_fetched(number)
            with self._lock:
                if not self._stop.is_set():
                    self._chunks[number] = data
                    while len(self._chunks) > self._memory_chunks:
                        self._chunks.popitem(last=False)
            return data
        finally:
            with self._lock:
                self._under_way.pop(number, None)

    def _cached_or_fetched(self, number: int) -> bytes:
        first, end = self._span(number)
        wanted = Range(uri=self.uri, size=self.size, etag=self._etag, first=first, last=end - 1)
        cached = self._cache.get(wanted) if self._cache else None
        if cached is not None:
            return cached
        data = get_range(wanted, patience=self._patience, stop=self._stop)
        if self._cache:
            self._cache.put(wanted, data)
        return data


_LINE_BYTES = 4096


@lru_cache(maxsize=1)
def _read_ahead_pool(_pid: int) -> ThreadPoolExecutor:
    """The threads of this process; a child of a fork has none of its parent's."""
    return ThreadPoolExecutor(READ_AHEAD_THREADS, thread_name_prefix="read-ahead")
