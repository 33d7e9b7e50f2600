"""Completions become rewards, or a RewardError. A failure is never a reward of zero.

Imports nothing heavy, for the processes that rewards live in start often.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence, Sized
from numbers import Real
from typing import TYPE_CHECKING, Any

from posttrain.errors import RewardError
from posttrain.plugin import resolve

if TYPE_CHECKING:
    from posttrain.data.types import Row

Value = tuple[float, dict[str, float]]
"""A reward and its named parts."""


class RewardWorker:
    """Calls a user's reward functions. Lives in a process of its own, which may be killed at a deadline."""

    def __init__(self, function: str | Mapping[str, float]):
        """
        Args:
            function: import path of `f(row, completion)`, or of `f(row, completions)`, which gets a group at once.
                Either gives a finite number or a dict of them for every completion. Or {path: weight}: the reward
                is the weighted sum, its parts are the values before their weights, under the functions' names.
        """
        self.weights = {function: 1.0} if isinstance(function, str) else dict(function)
        self.functions = {path: resolve(path, key="reward.function") for path in self.weights}
        self.names = None if isinstance(function, str) else part_names(list(function))

    def score(self, row: Row, completions: Sequence[str]) -> list[Value]:
        """Reward and named parts of every completion of one prompt.

        Raises:
            RewardError: a function raised, or returned something that is not a finite number or a dict of them, or
                not as many as there are completions; says which function, which completion, and the question.
        """
        try:
            found = {path: self._values(path, row, completions) for path in self.functions}
        except RewardError as error:
            raise RewardError(f"{error}{_question(row)}") from None
        if self.names is None:
            return next(iter(found.values()))
        return [self._sum({path: values[index] for path, values in found.items()}) for index in range(len(completions))]

    def _values(self, path: str, row: Row, completions: Sequence[str]) -> list[Value]:
        function = self.functions[path]
        if takes_groups(function):
            values = _called(path, "the group", lambda: function(row, list(completions)))
            if isinstance(values, str | Mapping) or not isinstance(values, Sized) or len(values) != len(completions):
                raise RewardError(f"{path} returned {values!r:.200}, not a value for each of {len(completions)}")
            values = list(values)  # pyright: ignore[reportArgumentType]
        else:
            shown = [f"completion {index}: {text[:200]!r}" for index, text in enumerate(completions)]
            pairs = zip(completions, shown, strict=True)
            values = [_called(path, where, lambda text=text: function(row, text)) for text, where in pairs]
        return [checked(value, where=f"{path}, completion {index}") for index, value in enumerate(values)]

    def _sum(self, found: dict[str, Value]) -> Value:
        assert self.names is not None
        parts: dict[str, float] = {}
        for path, (value, named) in found.items():
            name = self.names[path]
            parts |= {name: value} if named.keys() == {"reward"} else {f"{name}_{p}": x for p, x in named.items()}
        return sum(self.weights[path] * value for path, (value, _) in found.items()), parts


def checked(value: Any, *, where: str) -> Value:
    """A reward as its sum and its parts.

    Raises:
        RewardError: it is no finite number and no dict of them; begins with `where`.
    """
    parts = value if isinstance(value, dict) else {"reward": value}
    if not parts:
        raise RewardError(f"{where}: a dict without parts is not a reward")
    for name, part in parts.items():
        if not isinstance(part, Real) or not math.isfinite(part):
            raise RewardError(f"{where}: {name} is {part!r:.200}, not a finite number")
    numbers = {str(name): float(part) for name, part in parts.items()}
    return sum(numbers.values()), numbers


def takes_groups(function: Callable[..., Any]) -> bool:
    """Whether a reward function wants all completions of a prompt at once: its second parameter says `completions`."""
    try:
        return "completions" in list(inspect.signature(function).parameters)[:2]
    except (TypeError, ValueError):  # some builtins have no signature
        return False


def part_names(paths: Sequence[str]) -> dict[str, str]:
    """Path -> name of its part: that of the function, or the whole path where two functions share it."""
    names = [path.partition(":")[2] for path in paths]
    return {path: name if names.count(name) == 1 else path for path, name in zip(paths, names, strict=True)}


def _called(path: str, where: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        raise RewardError(f"{path} raised {type(error).__name__}: {error}{_line(path, error)}, on {where}") from None


def _line(path: str, error: Exception) -> str:
    """Where in the function's own file it was raised, or what raised was called."""
    file = getattr(sys.modules.get(path.partition(":")[0]), "__file__", None)
    found = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if file and frame.filename == file]
    return f" in {os.path.basename(str(file))}, line {found[-1]}" if found else ""


def _question(row: Row) -> str:
    messages = row.get("messages") if isinstance(row, Mapping) else None
    return f"; asked {str(messages[-1].get('content'))[:120]!r}" if messages else ""
