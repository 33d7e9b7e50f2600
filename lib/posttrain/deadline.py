"""A wait that cannot be forever: every await of the controller names what it waits for and how long."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from posttrain.errors import ComputeError

T = TypeVar("T")


async def within(seconds: float, what: str, awaitable: Awaitable[T]) -> T:
    """Await with a deadline.

    Raises:
        ComputeError: `what` did not finish in time.
    """
    try:
        return await asyncio.wait_for(awaitable, seconds)
    except TimeoutError:
        raise ComputeError(f"{what} did not finish within {seconds:g} s") from None
