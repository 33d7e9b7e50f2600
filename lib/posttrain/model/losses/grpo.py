"""Policy gradient on group-relative advantages, with the trainer-sampler gap measured and corrected."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from posttrain.data.types import Batch
from posttrain.model.losses import Reads
from posttrain.model.output import Output


@dataclass(frozen=True)
class GRPOLoss:
    """-sum_t m_t [w_t r_t A_t - kl_coef * kl_t] over loss tokens (GRPO, arXiv:2402.03300, eq. 3 and 4).

    One optimizer step per batch makes the batch on-policy for the trainer: the old
    logprob is this forward's own, detached, so r_t = exp(logp - stop_grad(logp)) is 1 in
    value, carries the gradient, and needs no second forward. The clip of eq. 3 could
    never bind on such a ratio and is therefore not written.

    What is left is the gap between trainer and sampler, corrected by the truncated
    importance weight w_t = min(exp(logp - logp_sampler), importance_cap), detached
    (IMPALA's rho, arXiv:1802.01561). kl_t is the k3 estimate of KL(policy || reference).
    """

    reads: ClassVar[Reads] = "tokens"
    temperature: float
    importance_cap: float = 2.0
    kl_coef: float = 0.0

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.advantages is not None and batch.sampler_logprobs is not None, "GRPO reads rollouts"
        logprobs, mask = output.logprobs, batch.loss_mask
        gap = logprobs.detach() - batch.sampler_logprobs
        importance = gap.exp()
        ratio = (logprobs - logprobs.detach()).exp()
        loss = -(mask * importance.clamp(max=self.importance_cap) * ratio * batch.advantages).sum()
        metrics = {
            "entropy": (mask * output.entropy).sum(),
            "mismatch_kl": (mask * (importance - 1 - gap)).sum(),
            "mismatch_abs": (mask * gap.abs()).sum(),
            "importance_clipped": (mask * (importance > self.importance_cap)).sum(),
        }
        if batch.ref_logprobs is not None:
            ref_gap = batch.ref_logprobs - logprobs
            kl = (mask * (ref_gap.exp() - ref_gap - 1)).sum()
            loss = loss + self.kl_coef * kl
            metrics["kl"] = kl.detach()
        return loss, metrics
