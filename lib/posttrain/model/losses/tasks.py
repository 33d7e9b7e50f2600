"""Next tokens and what comes of them in one loss: heads beside the LM head, asked where an answer ends."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from posttrain.data.types import Batch
from posttrain.model.losses import Loss, Reads
from posttrain.model.losses.reward import MultiTaskLoss
from posttrain.model.output import Output


@dataclass(frozen=True, kw_only=True)
class TaskLoss:
    """policy + sum_i coef_i sum_m d_i(s_i(h_m), y_mi), d_i a squared error or a binary cross-entropy.

    h_m is the hidden state at the m-th labelled position, where the model has read an answer (data/turn_numbers.py), y
    its labels, NaN where one is missing. All is divided by the batch's loss tokens, as the policy's part is: with one
    trained token and its stop an answer, coef = 2 makes a task's mean weigh what the token's mean weighs.
    """

    reads: ClassVar[Reads] = "tasks"
    policy: Loss
    """One that reads tokens."""
    tasks: MultiTaskLoss
    """Its k-th part reads the k-th label, and the head of that name."""

    @property
    def temperature(self) -> float:
        """That of the tokens' loss."""
        return self.policy.temperature

    def __post_init__(self):
        assert self.policy.reads == "tokens", "tasks stand beside a loss of tokens"

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Args: output.scores are [M, 1], at the labelled positions."""
        loss, metrics = self.policy(output, batch)
        rest, more = self.of_tasks(output.scores, batch)
        return loss + rest, metrics | more

    def of_tasks(self, scores: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of the sum that has no logprobs in it, and sums of what is measured, as `click/accuracy`, of so many
        labels as `click/labelled` says.

        Args:
            scores: [M, 1] float32 of every head, with gradient.
            batch: of whose columns labels [M, K] are read.
        """
        assert batch.labels is not None, "heads of answers learn from the rows' labels"
        fields = {part.task: batch.labels[:, k] for k, (_, part) in enumerate(self.tasks.parts)}
        none = batch.labels.new_empty(0)
        output = Output(logprobs=none, entropy=none, scores=dict(scores))
        return self.tasks(output, replace(batch, fields=fields))
