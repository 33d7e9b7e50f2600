"""Supervised fine-tuning: masked negative log-likelihood."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from posttrain.data.types import Batch
from posttrain.model.losses import Reads
from posttrain.model.output import Output


@dataclass(frozen=True)
class SFTLoss:
    """Sum of -log p(target) over loss tokens, in nats."""

    reads: ClassVar[Reads] = "tokens"
    temperature: float = 1.0

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = -(batch.loss_mask * output.logprobs).sum()
        return loss, {"entropy": (batch.loss_mask * output.entropy).sum()}
