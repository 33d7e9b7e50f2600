"""A built-in game of several turns: find a digit with as few questions as one can. `rollout.environment` may name it.

The policy writes a digit; the environment answers "higher" or "lower". Halving the range
finds any digit in four turns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from posttrain.data.environment import Talk
    from posttrain.data.types import Row

MOST_TURNS = 4


class GuessNumber:
    """Reads `secret` of the row. Reward: 1 less 0.1 for every turn after the first, 0 where it was not found."""

    async def rollout(self, row: Row, talk: Talk) -> dict[str, float]:
        """Play one game; parts `found` and `turns`."""
        messages: list[dict[str, str]] = []
        for turn in range(MOST_TURNS):
            said = await talk.turn(*messages)
            if said is None:
                break
            if said.strip() == str(row["secret"]):
                return {"found": 1.0, "turns": -0.1 * turn}
            messages = [{"role": "user", "content": _hint(said, row["secret"])}]
        return {"found": 0.0, "turns": 0.0}


def prompts(seed: int, count: int = 1024) -> list[Row]:
    """Games with their secrets."""
    digits = np.random.default_rng([seed, 5]).integers(0, 10, count)
    return [_row(int(digit), f"game {number}") for number, digit in enumerate(digits)]


def held_out(seed: int) -> list[Row]:
    """One game of every secret, under names that training does not have."""
    return [_row(digit, f"test game {digit}") for digit in range(10)]


def demonstrations(seed: int, count: int = 4096) -> list[Row]:
    """Games played with guesses by chance, each inside the range that is left."""
    rng = np.random.default_rng([seed, 6])
    return [{"messages": _played(int(rng.integers(0, 10)), rng)} for _ in range(count)]


def _played(secret: int, rng: np.random.Generator) -> list[dict[str, str]]:
    low, high, guess = 0, 9, -1
    messages = _row(secret, f"game {rng.integers(10_000)}")["messages"]
    while guess != secret:
        if guess >= 0:
            hint = _hint(str(guess), secret)
            low, high = (guess + 1, high) if hint == "higher" else (low, guess - 1)
            messages.append({"role": "user", "content": hint})
        guess = int(rng.integers(low, high + 1))
        messages.append({"role": "assistant", "content": str(guess)})
    return messages


def _hint(said: str, secret: int) -> str:
    if not said.strip().isdecimal():
        return "write a digit"
    return "higher" if secret > int(said.strip()[:9]) else "lower"


def _row(secret: int, name: str) -> Row:
    return {"messages": [{"role": "user", "content": f"{name}: find the digit"}], "secret": secret}
