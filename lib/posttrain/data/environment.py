"""Environments: what the policy talks with for several turns, as a tool or a game; and the process that holds them.

Foreign code lives in child processes, the tokens do not: an environment sees texts, and workflow/environments.py
turns what it says into tokens. Imports nothing heavy.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.data.reward import checked
from posttrain.errors import EpisodeError
from posttrain.plugin import resolve

if TYPE_CHECKING:
    from posttrain.data.types import Row

Message = dict[str, str]
"""{"role": "user" or "tool", "content": str}, as the chat template knows them."""


class Talk:
    """One episode, as the environment sees it."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        """The episode's own source of chance: the same after any restart."""
        self.asked: asyncio.Queue[list[Message]] = asyncio.Queue()
        self.answers: asyncio.Queue[str | None] = asyncio.Queue()

    async def turn(self, *messages: Message) -> str | None:
        """Say something, and let the policy answer.

        Args:
            messages: what follows the policy's last turn; before its first turn, what follows the row's messages.

        Returns:
            the policy's text; None where no tokens are left or its last turn was cut: the episode is over.
        """
        self.asked.put_nowait(list(messages))
        return await self.answers.get()


class Environment(Protocol):
    """Made once in each process, without arguments; many episodes are under way in it at once.

    A class with the attribute `constraint = "package.module:name"` says which tokens the policy may write: see
    data/constraint.py.
    """

    async def rollout(self, row: Row, talk: Talk) -> float | dict[str, float] | None:
        """Play one episode on a row of the prompts.

        Returns:
            its reward, or named parts that sum to it; None leaves it to the config's reward.
        """
        ...


class EnvironmentHost:
    """Lives in a child process: episodes by key, each one a coroutine of the environment."""

    def __init__(self, environment: str):
        self.path = environment
        self.environment: Environment = resolve(environment, key="rollout.environment")()
        self.episodes: dict[str, tuple[Talk, asyncio.Task[Any]]] = {}

    def ping(self) -> bool:
        """Answers unless an episode blocks the process."""
        return True

    async def start(self, key: str, row: Row, seed: int) -> dict[str, Any]:
        """Begin an episode; returns {"ask": messages}, or {"reward": [sum, parts]} ({"reward": None}) at its end.

        Raises:
            EpisodeError: the environment raised.
            RewardError: what it returned is no reward.
        """
        talk = Talk(seed)
        self.episodes[key] = talk, asyncio.create_task(_awaited(self.environment, row, talk))
        return await self._next(key)

    async def go_on(self, key: str, text: str | None) -> dict[str, Any]:
        """Give the policy's text; returns and raises as start()."""
        self.episodes[key][0].answers.put_nowait(text)
        return await self._next(key)

    def end(self, key: str) -> None:
        """Forget an episode."""
        if key in self.episodes:
            self.episodes.pop(key)[1].cancel()

    async def _next(self, key: str) -> dict[str, Any]:
        talk, playing = self.episodes[key]
        asked = asyncio.create_task(talk.asked.get())
        await asyncio.wait({asked, playing}, return_when=asyncio.FIRST_COMPLETED)
        if asked.done():
            return {"ask": asked.result()}
        asked.cancel()
        del self.episodes[key]
        try:
            value = playing.result()
        except Exception as error:
            raise EpisodeError(f"{self.path} raised {type(error).__name__}: {error}") from None
        return {"reward": None if value is None else checked(value, where=self.path)}


async def _awaited(environment: Environment, row: Row, talk: Talk) -> Any:
    return await environment.rollout(row, talk)
