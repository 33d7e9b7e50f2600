"""Completions become rewards, or a RewardError. A failure is never a reward of zero."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from posttrain.data.types import Row
from posttrain.errors import RewardError
from posttrain.plugin import resolve


class RewardWorker:
    """Calls a user's reward function. Lives in a process of its own, which may be killed at a deadline."""

    def __init__(self, function: str):
        self.path = function
        self.function = resolve(function, key="reward.function")

    def ready(self) -> bool:
        """Answers once the function is imported."""
        return True

    def score(self, row: Row, completions: Sequence[str]) -> list[tuple[float, dict[str, float]]]:
        """Reward and named parts of every completion of one prompt.

        Raises:
            RewardError: the function raised, or returned something that is not a finite
                number or a dict of them; says which completion.
        """
        scored = []
        for index, completion in enumerate(completions):
            try:
                value = self.function(row, completion)
            except Exception as error:
                raise RewardError(
                    f"{self.path} raised {type(error).__name__}: {error}, on completion {index}: {completion[:200]!r}"
                ) from None
            scored.append(_checked(value, where=f"{self.path}, completion {index}"))
        return scored


def _checked(value: Any, *, where: str) -> tuple[float, dict[str, float]]:
    parts = value if isinstance(value, dict) else {"reward": value}
    if not parts:
        raise RewardError(f"{where}: a dict without parts is not a reward")
    for name, part in parts.items():
        if not isinstance(part, Real) or not math.isfinite(part):
            raise RewardError(f"{where}: {name} is {part!r}, not a finite number")
    numbers = {str(name): float(part) for name, part in parts.items()}
    return sum(numbers.values()), numbers
