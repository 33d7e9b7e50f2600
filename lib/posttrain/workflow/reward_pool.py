"""The process that scores groups, started anew when it dies, hangs or passes its deadline."""

import asyncio
from collections.abc import Sequence

from posttrain.compute.pool import Pool
from posttrain.compute.workers import ActorGroup
from posttrain.data.reward import RewardWorker
from posttrain.data.types import Row
from posttrain.errors import ComputeError, RewardError
from posttrain.workflow.reward_model import RewardModel

START_SECONDS = 120
"""For a reward process to start and import its function."""


class RewardPool:
    """One process that scores; killed and started anew when a group passes its deadline."""

    def __init__(self, function: str | None, *, model: str | None = None, timeout_s: float):
        """
        Args:
            model: folder of a reward model, in place of a function.
        """
        self.worker = (RewardWorker, {"function": function}) if model is None else (RewardModel, {"folder": model})
        self.timeout_s = timeout_s
        self.workers = self._start()
        self._turn = asyncio.Lock()
        """Many groups ask at once; each has its deadline from when it is scored."""

    async def score(self, row: Row, completions: Sequence[str]) -> list[tuple[float, dict[str, float]]]:
        """Rewards of one group.

        Raises:
            RewardError: the function failed, died, or did not answer in time.
        """
        async with self._turn:
            try:
                return await self.workers.call_one(0, "score", row, list(completions), timeout_s=self.timeout_s)
            except ComputeError as error:
                self.workers.kill()
                self.workers = self._start()
                await self.ready()
                raise RewardError(str(error)) from None

    async def ready(self) -> None:
        """Wait until the process has imported the function: its first call is then not charged for that.

        Raises:
            ComputeError: it did not come up in START_SECONDS.
        """
        await self.workers.call_one(0, "ready", timeout_s=START_SECONDS)

    def _start(self) -> ActorGroup:
        cls, arguments = self.worker
        return ActorGroup("reward", cls, [arguments], Pool(cpus=0))
