"""CPU actors that compute windows of packs, where one thread of the driver is too slow: tokenising online at scale.

A window is a pure function, so any actor may compute any; the Loader keeps their order. Packs
come back through Ray's object store, 12 bytes a token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from posttrain.compute.workers import ActorGroup
from posttrain.data.loader import Work
from posttrain.data.stream import PackStream, Window


class WindowWorker:
    """One actor with a stream of its own."""

    def __init__(self, make: Callable[[], PackStream]):
        self.stream = make()

    def window(self, index: int) -> Window:
        """As PackStream.window()."""
        return self.stream.window(index)


@contextmanager
def window_workers(make: Callable[[], PackStream], *, count: int, timeout_s: float) -> Iterator[list[Work]]:
    """The work of `count` actors, for data/loader.py's loading(); they end with the block.

    Args:
        make: opens the stream, in every actor; must travel by pickle.
        timeout_s: deadline of one window, the opening of the stream included.

    Raises:
        ComputeError: from a work: its actor died, or did not answer in time.
    """
    group = ActorGroup("data worker", WindowWorker, [{"make": make}] * count)

    def work_of(rank: int) -> Work:
        return lambda index: group.wait(rank, "window", index, timeout_s=timeout_s)

    try:
        yield [work_of(rank) for rank in range(count)]
    finally:
        group.kill()
