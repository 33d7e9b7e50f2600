"""Windows become global batches of G packs, made ahead by threads; the state is a few integers.

The state is what has been handed out, never what was prefetched: committed with the batch
that was trained, it continues with the next one, whatever the number of ranks or workers.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import Any

from posttrain.data.encode import CHOSEN_DROPS
from posttrain.data.mixture import WINDOW
from posttrain.data.stream import PackStream, Window
from posttrain.data.types import Pack
from posttrain.errors import ComputeError, DataError

AHEAD = 2
"""Windows made before they are asked for, beside the one that each further worker makes."""

GRACE_S = 30
"""For the windows that are being made when the loading ends, seconds; each takes one or two."""

EMPTY_WINDOWS = 16
"""Windows without a pack, one after the other, that end the run: sources that repeat would give no other."""

Work = Callable[[int], Window]
"""Computes a window, here or elsewhere."""


class Loader:
    """The packs of a stream in their order, G at a time."""

    def __init__(
        self,
        stream: PackStream,
        submit: Callable[[int], Future[Window]],
        *,
        ahead: int = AHEAD,
        max_bad_rows: int,
        state: dict | None,
        timeout_s: float,
    ):
        """
        Args:
            submit: begins to compute a window somewhere.
            ahead: windows that are begun before they are wanted.
            max_bad_rows: rows that may be left out for a fault of theirs; one more stops the run.
            state: what state() returned; None starts at the beginning.
            timeout_s: deadline of one window, seconds.

        Raises:
            DataError: the state counts in windows of another size.
        """
        self._draws = stream.mixture.window_size
        start = {"window": 0, "packs": 0, "counts": [0] * len(stream.sources), "dropped": {}, "draws": self._draws}
        state = state or start
        if (draws := state.get("draws", WINDOW)) != self._draws:
            raise DataError(
                f"the checkpoint counts in windows of {draws} draws and this run's have {self._draws}: its place in "
                "the data cannot be found; resume it with the data.pack_tokens and the version that wrote it"
            )
        self._submit, self.ahead = submit, ahead
        self.max_bad_rows, self.timeout_s = max_bad_rows, timeout_s
        self.window, self.packs = int(state["window"]), int(state["packs"])
        self.dropped = Counter(state["dropped"])
        self.counts = tuple(state["counts"])
        stream.mixture.resume(self.window, self.counts)
        self._counted = self.packs > 0  # the drops of a window are counted when its first pack is handed out
        self._coming: deque[Future[Window]] = deque()
        self._current: Window | None = None

    def take(self, count: int) -> list[Pack]:
        """The next `count` packs.

        Raises:
            DataError: the mixture ends before them, or too many rows were bad; names the last one.
            ComputeError: a window did not come in time.
        """
        packs: list[Pack] = []
        empty = 0
        while len(packs) < count:
            window = self._window()
            if not window.num_draws:
                raise DataError(
                    f"the data end in window {window.index}, {count - len(packs)} packs short of a global batch"
                    f"{self._dropped()}; allow more epochs of a source, or train fewer steps"
                )
            self._count(window)
            empty = 0 if window.packs else empty + 1
            if empty == EMPTY_WINDOWS:
                raise DataError(
                    f"no row is left of the last {EMPTY_WINDOWS * window.num_draws:,} draws{self._dropped()}; look at "
                    "the sources with `posttrain preview`, and at data.over_long"
                )
            part = window.packs[self.packs : self.packs + count - len(packs)]
            packs += part
            self.packs += len(part)
            if self.packs == len(window.packs):
                self.window, self.packs, self.counts = self.window + 1, 0, window.counts
                self._counted, self._current = False, None
        return packs

    def state(self) -> dict[str, Any]:
        """Where the next take() begins, as plain values for a checkpoint."""
        return {
            "window": self.window,
            "packs": self.packs,
            "counts": list(self.counts),
            "dropped": dict(self.dropped),
            "draws": self._draws,
        }

    def forget(self) -> None:
        """Give up the windows that were begun and not taken."""
        for future in self._coming:
            future.cancel()
        self._coming.clear()

    def _window(self) -> Window:
        if self._current is None:
            while len(self._coming) <= self.ahead:
                self._coming.append(self._submit(self.window + len(self._coming)))
            try:
                self._current = self._coming.popleft().result(self.timeout_s)
            except FutureTimeout:
                raise ComputeError(f"window {self.window} of the data did not come in {self.timeout_s:g} s") from None
        return self._current

    def _dropped(self) -> str:
        gone = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
        return f" (dropped so far: {gone})" if gone else ""

    def _count(self, window: Window) -> None:
        if self._counted:
            return
        self._counted = True
        self.dropped.update(each.reason for each in window.dropped)
        bad = sum(count for reason, count in self.dropped.items() if reason not in CHOSEN_DROPS)
        if bad > self.max_bad_rows:
            last = next(each for each in reversed(window.dropped) if each.reason not in CHOSEN_DROPS)
            raise DataError(
                f"{bad} bad rows, data.max_bad_rows allows {self.max_bad_rows}; the last: {last.where} ({last.reason})"
            )


@contextmanager
def loading(
    stream: PackStream,
    *,
    workers: Sequence[Work] = (),
    max_bad_rows: int = 0,
    state: dict | None = None,
    timeout_s: float = 600,
) -> Iterator[Loader]:
    """A Loader whose windows are made ahead, by one thread for each of `workers`; without any, by one thread here."""
    wanted: SimpleQueue[tuple[Future[Window], int] | None] = SimpleQueue()
    works = list(workers) or [stream.window]

    def submit(window: int) -> Future[Window]:
        future: Future[Window] = Future()
        wanted.put((future, window))
        return future

    # Not an executor, which would wait for ever at exit for a read that hangs.
    threads = [Thread(target=_serve, args=(work, wanted), name="packs", daemon=True) for work in works]
    for thread in threads:
        thread.start()
    ahead = AHEAD + len(works) - 1
    loader = Loader(stream, submit, ahead=ahead, max_bad_rows=max_bad_rows, state=state, timeout_s=timeout_s)
    try:
        yield loader
    finally:
        loader.forget()
        for _ in threads:
            wanted.put(None)
        for thread in threads:  # a thread inside of Rust or Arrow at the interpreter's end would abort the process
            thread.join(GRACE_S)


def _serve(work: Work, wanted: SimpleQueue) -> None:
    """Make windows until there is no more to make; an error belongs to who asked for the window."""
    while (item := wanted.get()) is not None:
        future, window = item
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(work(window))
        except Exception as error:
            future.set_exception(error)
