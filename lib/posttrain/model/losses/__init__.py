"""Losses: (Output, Batch) -> sums over the loss's unit. The engine divides, once, by the global count."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from posttrain.data.types import Batch, Pack
from posttrain.model.output import Output

Reads = Literal["tokens", "values", "sequences", "documents", "scores", "teacher", "tasks"]
"""What a loss needs of the forward pass, and so how its gradient may be made:

- tokens: a sum over rows of a function of that row's Output and Batch columns alone; its
  gradients can be made chunk by chunk inside the forward pass (SFT, GRPO, top-k distillation).
- values: a loss that reads tokens, `policy`, and beside it a function of all rows' values, `of_values()` (PPO).
- tasks: a loss that reads tokens, `policy`, and beside it a function of heads where answers end, `of_tasks()`.
- sequences: any function of all rows' logprobs together, summed over tokens (GSPO).
- documents: the same, summed over pairs or documents (DPO).
- scores: a function of Output.scores; needs no LM head (reward models).
- teacher: the full next-token distributions of a student and a teacher (distillation).
"""


class Loss(Protocol):
    """A weighted sum over loss tokens, pairs or documents, so packing and accumulation cannot change the step."""

    @property
    def temperature(self) -> float:
        """Temperature that the batch's targets were sampled at."""
        ...

    reads: ClassVar[Reads]
    """What the forward pass must provide."""

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss sum with gradient, and metric sums in the same unit (per loss token, pair, ...) without."""
        ...


def count(loss: Loss, packs: Sequence[Pack]) -> float:
    """What the sums of a global batch are divided by: its loss tokens by weight, or its pairs or documents."""
    if loss.reads in ("tokens", "values", "tasks", "sequences", "teacher"):
        return sum(pack.loss_tokens for pack in packs)
    return float(sum(pack.num_units for pack in packs))
