"""Environments written for others' interfaces, by their methods alone: neither package is imported.

A config names a function or class of yours that makes one:

    def frozen_lake():
        return GymEnvironment(lambda row: gymnasium.make("FrozenLake-v1"))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.data.environment import Talk
    from posttrain.data.types import Row


class GymEnvironment:
    """Gymnasium's reset() and step(): observations become user turns, the policy's texts actions.

    Args:
        make: row -> an environment, one an episode.
        show: observation -> text.
        act: text -> action; what it raises costs the group, so it must know what to do with any text.
    """

    def __init__(
        self, make: Callable[[Row], Any], *, show: Callable[[Any], str] = str, act: Callable[[str], Any] = str
    ):
        self.make, self.show, self.act = make, show, act

    async def rollout(self, row: Row, talk: Talk) -> float:
        """The sum of an episode's rewards."""
        env = self.make(row)
        try:
            observation, _ = env.reset(seed=talk.random.getrandbits(31))
            total = 0.0
            while (said := await talk.turn({"role": "user", "content": self.show(observation)})) is not None:
                observation, reward, terminated, truncated, _ = env.step(self.act(said))
                total += float(reward)
                if terminated or truncated:
                    break
            return total
        finally:
            env.close()


class VerifiersEnvironment:
    """The multi-turn shape of the package verifiers: setup_state(), is_completed(), env_response().

    Args:
        env: has `async env_response(messages, state)`, giving messages or (messages, state); `is_completed(messages,
            state)`; and, where it wants, `setup_state(state)`. Plain functions do as well.
        reward: (messages, state) -> reward or its parts, plain or async: what a rubric's functions compute.
    """

    def __init__(self, env: Any, reward: Callable[[list[dict[str, Any]], dict[str, Any]], Any]):
        self.env, self.reward = env, reward

    async def rollout(self, row: Row, talk: Talk) -> Any:
        """Play until the environment says that it is over, or no tokens are left."""
        messages = list(row["messages"]) if "messages" in row else [{"role": "user", "content": row["prompt"]}]
        state: dict[str, Any] = {"prompt": list(messages), "info": dict(row), "answer": row.get("answer"), "turn": 0}
        if hasattr(self.env, "setup_state"):
            state = await _awaited(self.env.setup_state(state)) or state
        new: list[dict[str, Any]] = []
        while (said := await talk.turn(*new)) is not None:
            messages.append({"role": "assistant", "content": said})
            state["turn"] += 1
            if await _awaited(self.env.is_completed(messages, state)):
                break
            answer = await _awaited(self.env.env_response(messages, state))
            new, state = answer if isinstance(answer, tuple) else (answer, state)
            new = [{"role": each["role"], "content": str(each["content"])} for each in new]
            messages += new
        return await _awaited(self.reward(messages, state))


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
