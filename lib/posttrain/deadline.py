"""A wait that cannot be forever: every await of the controller names what it waits for and how long."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from posttrain.errors import ComputeError

T = TypeVar("T")


class DeadlineError(ComputeError):
    """The wait is over, and what was waited for is not."""


async def within(seconds: float, what: str | Callable[[], str], awaitable: Awaitable[T]) -> T:
    """Await with a deadline.

    Args:
        what: is waited for; or says so when the deadline has passed, where it is not known before.

    Raises:
        DeadlineError: `what` did not finish in time.
    """
    task = asyncio.ensure_future(awaitable)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)  # not wait_for: the work may raise a TimeoutError itself
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not done:
        task.cancel()
        raise DeadlineError(f"{what if isinstance(what, str) else what()} did not finish within {seconds:g} s")
    return task.result()
