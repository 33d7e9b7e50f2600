"""Packs that are never trained on: the loss on them during an offline run, and the best weights so far."""

import math
from collections.abc import Sequence

from posttrain import storage
from posttrain.data.types import Pack
from posttrain.model.losses import Loss
from posttrain.workflow.observers import Metrics
from posttrain.workflow.policy import Policy


class HeldOut:
    """Measures every so many steps, and at the end; keeps the weights that had the least loss, where that is wanted.

    Which are the best is read from the run's history, so that a resumed run goes on with the same answer.
    """

    def __init__(self, packs: Sequence[Pack], *, every_steps: int, num_steps: int, best_uri: str | None):
        """
        Args:
            best_uri: where model folders of the best weights go; None keeps none.
        """
        self.packs, self.every_steps, self.num_steps, self.best_uri = list(packs), every_steps, num_steps, best_uri

    async def measure(self, step: int, policy: Policy, loss: Loss, history: Sequence[Metrics]) -> Metrics:
        """eval/* of the weights after `step`, where they are due; published where no earlier ones are as good."""
        if not self.packs or ((step + 1) % self.every_steps and step + 1 != self.num_steps):
            return {}
        found = {f"eval/{name}": value for name, value in (await policy.evaluate(self.packs, loss)).items()}
        if self.best_uri is not None and found["eval/loss"] < self.best(history)[1]:
            await policy.export(self._uri(step))
        return found

    def best(self, history: Sequence[Metrics]) -> tuple[str | None, float]:
        """URI of the best weights so far, None where there are none, and their loss."""
        measured = [(row["eval/loss"], int(row["step"])) for row in history if "eval/loss" in row]
        if self.best_uri is None or not measured:
            return None, math.inf
        loss, step = min(measured)
        return self._uri(step), loss

    def prune(self, history: Sequence[Metrics]) -> None:
        """Remove all but the best of a history that is committed: no resume can need the others any more."""
        if self.best_uri is None:
            return
        best, _ = self.best(history)
        for name in storage.list_folders(self.best_uri):
            uri = storage.join(self.best_uri, name)
            if uri != best:
                storage.remove_folder(uri)

    def _uri(self, step: int) -> str:
        assert self.best_uri is not None
        return storage.join(self.best_uri, f"step_{step + 1:06d}")
