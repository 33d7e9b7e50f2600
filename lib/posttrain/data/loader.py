"""Windows become global batches of G packs, made ahead in a thread; the state is a few integers.

The state is what has been handed out, never what was prefetched: committed with the batch
that was trained, it continues with the next one, whatever the number of ranks or workers.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from posttrain.data.encode import CHOSEN_DROPS
from posttrain.data.stream import PackStream, Window
from posttrain.data.types import Pack
from posttrain.errors import DataError

AHEAD = 2
"""Windows made before they are asked for."""


class Loader:
    """The packs of a stream in their order, G at a time."""

    def __init__(
        self, stream: PackStream, submit: Callable[[int], Future[Window]], *, max_bad_rows: int, state: dict | None
    ):
        """
        Args:
            submit: begins to compute a window somewhere.
            max_bad_rows: rows that may be left out for a fault of theirs; one more stops the run.
            state: what state() returned; None starts at the beginning.
        """
        state = state or {"window": 0, "packs": 0, "counts": [0] * len(stream.sources), "dropped": {}}
        self._submit, self.max_bad_rows = submit, max_bad_rows
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
        """
        packs: list[Pack] = []
        while len(packs) < count:
            window = self._window()
            if not window.num_draws:
                raise DataError(
                    f"the data end in window {window.index}, {count - len(packs)} packs short of a global batch; "
                    "allow more epochs of a source, or train fewer steps"
                )
            self._count(window)
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
        }

    def _window(self) -> Window:
        if self._current is None:
            while len(self._coming) <= AHEAD:
                self._coming.append(self._submit(self.window + len(self._coming)))
            self._current = self._coming.popleft().result()
        return self._current

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
def loading(stream: PackStream, *, max_bad_rows: int = 0, state: dict | None = None) -> Iterator[Loader]:
    """A Loader whose windows are made in one thread of this process, which ends with the block."""
    with ThreadPoolExecutor(1, thread_name_prefix="packs") as pool:
        try:
            yield Loader(
                stream, lambda window: pool.submit(stream.window, window), max_bad_rows=max_bad_rows, state=state
            )
        finally:
            pool.shutdown(cancel_futures=True)
