"""The processes that score groups, side by side; one that dies, hangs or passes its deadline is killed and replaced.

One group of ASK_AGAIN is scored twice, and the first scores count: a reward that is not a function of its row and
completion makes resumes differ and adds noise that no group size removes, and nothing else would show it.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.compute.child import Child
from posttrain.data.types import Row
from posttrain.errors import ComputeError, RewardError

START_SECONDS = 120
"""For a reward process to start and import its function."""

ASK_AGAIN = 100
"""One group of so many is scored twice: 1 % of the reward's time."""

Scores = list[tuple[float, dict[str, float]]]


class RewardPool:
    """`workers` processes, each with one group at a time. A group's scores do not depend on which one has it."""

    def __init__(
        self,
        function: str | Mapping[str, float] | None,
        *,
        model: str | None = None,
        weights: Mapping[str, float] | None = None,
        timeout_s: float,
        workers: int = 1,
        ask_again: int = ASK_AGAIN,
    ):
        """
        Args:
            function: import path, or paths with their weights in a sum: see RewardWorker.
            model: folder of a reward model, in place of a function.
            weights: of the outputs of one that has several.
            timeout_s: for one group, from when a process takes it.
            ask_again: one group of so many is scored twice.
        """
        self.cls, self.arguments = "posttrain.data.reward:RewardWorker", {"function": function}
        if model is not None:
            self.cls = "posttrain.workflow.reward_model:RewardModel"
            self.arguments = {"folder": model, "weights": weights}
        self.timeout_s, self.ask_again = timeout_s, ask_again
        self.scored, self.differed = 0, 0
        """Groups scored, and groups that had other scores the second time."""
        self.notes: list[str] = []
        """What a person should know, each once; who shows a note takes it away."""
        self._idle: asyncio.Queue[tuple[int, Child | None]] = asyncio.Queue()
        for number in range(workers):
            self._idle.put_nowait((number, None))

    async def score(self, row: Row, completions: Sequence[str]) -> Scores:
        """Rewards of one group, once a process is free.

        Raises:
            RewardError: the function failed, died, or did not answer in time.
            ConfigError: there is no such function.
        """
        number, child = await self._idle.get()
        sound = False
        try:
            child = child or await self._start(number)
            answer = await child.call("score", row, list(completions), timeout_s=self.timeout_s)
            self.scored += 1
            sound = self.scored % self.ask_again != 0 or await self._same_again(child, row, completions, answer)
        except RewardError:
            sound = True
            raise
        except ComputeError as error:
            raise RewardError(str(error)) from None
        finally:
            if not sound and child is not None:
                child.kill()
            self._idle.put_nowait((number, child if sound else None))
        return _paired(answer, count=len(completions))

    async def ready(self) -> None:
        """Wait until every process has imported the function.

        Raises:
            ComputeError: one did not come up in START_SECONDS.
            ConfigError: there is no such function.
        """
        waiting = [self._idle.get_nowait() for _ in range(self._idle.qsize())]
        started = await asyncio.gather(*(self._start(number) for number, _ in waiting))
        for (number, _), child in zip(waiting, started, strict=True):
            self._idle.put_nowait((number, child))

    async def _same_again(self, child: Child, row: Row, completions: Sequence[str], answer: Any) -> bool:
        """Score a group once more and count it where that differs; whether the process is sound after it."""
        sound = True
        try:
            again = await child.call("score", row, list(completions), timeout_s=self.timeout_s)
        except RewardError as error:
            again = f"an error: {error}"
        except ComputeError as error:
            sound, again = False, f"an error: {error}"
        if again != answer:
            self.differed += 1
            if self.differed == 1:
                self.notes.append(
                    f"the reward is not deterministic: it gave one group {answer!r:.200} and, asked again, "
                    f"{again!r:.200}; metrics and weights of a resumed run will differ"
                )
        return sound

    async def _start(self, number: int) -> Child:
        return await Child.start(f"reward {number}", self.cls, self.arguments, timeout_s=START_SECONDS)


def _paired(answer: Any, *, count: int) -> Scores:
    if len(answer) != count:
        raise RewardError(f"{len(answer)} rewards for {count} completions")
    return [(reward, parts) for reward, parts in answer]
