"""Tasks that live no longer than the block that starts them, and fail as one: with the error that explains the rest."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from posttrain.errors import WorkerDiedError


@asynccontextmanager
async def supervised() -> AsyncIterator[asyncio.TaskGroup]:
    """A TaskGroup: the first failure cancels the block and all its tasks, and is raised when they have ended.

    Raises:
        the death of a worker if there was one, else what came first; not an ExceptionGroup.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except ExceptionGroup as group:
        errors = list(_leaves(group))
        raise next((each for each in errors if isinstance(each, WorkerDiedError)), errors[0]) from None


def _leaves(group: ExceptionGroup[Exception]) -> Iterator[Exception]:
    for each in group.exceptions:
        if isinstance(each, ExceptionGroup):
            yield from _leaves(each)
        else:
            yield each
