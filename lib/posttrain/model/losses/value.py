"""A policy-gradient loss with a critic beside it: the value head learns the returns that advantages were made of."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from posttrain.data.types import Batch
from posttrain.model.losses import Loss, Reads
from posttrain.model.output import Output


@dataclass(frozen=True, kw_only=True)
class ValueLoss:
    """policy + coef * sum_t m_t max((V_t - R_t)^2, (V_t^clip - R_t)^2) / 2, V^clip within `clip` of the old V.

    PPO, arXiv:1707.06347, eq. 9, with the clipping of its authors' implementation (openai/baselines, ppo2), as in
    InstructGPT and TRL's PPOTrainer. V old is the head's before the step, batch.values; R is batch.returns. At the
    first pass over a batch the two V are equal and nothing is clipped.
    """

    reads: ClassVar[Reads] = "values"
    policy: Loss
    """One that reads tokens, on batch.advantages."""
    coef: float = 0.1
    """TRL's vf_coef."""
    clip: float = 0.2
    """In units of the reward."""

    @property
    def temperature(self) -> float:
        """That of the policy's loss."""
        return self.policy.temperature

    def __post_init__(self):
        assert self.policy.reads == "tokens", "advantages a token stand beside a loss of tokens"

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert output.values is not None, "a loss that reads values needs the head `value`"
        loss, metrics = self.policy(output, batch)
        of_values, more = self.of_values(output.values, batch)
        return loss + of_values, metrics | more

    def of_values(self, values: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of the sum that has no logprobs in it; its metrics are without `coef`.

        Args:
            values: [N] float32 of the head now, with gradient.
        """
        old, returns, mask = batch.values, batch.returns, batch.loss_mask
        assert old is not None and returns is not None, "a critic learns from the values and returns of its rollouts"
        near = torch.clamp(values, old - self.clip, old + self.clip)
        free, held = (values - returns).square(), (near - returns).square()
        loss = (mask * torch.maximum(free, held)).sum() / 2
        metrics = {"value/loss": loss.detach(), "value/clipped": (mask * (held > free)).sum()}
        return self.coef * loss, metrics
