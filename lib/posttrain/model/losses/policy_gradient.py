"""Policy-gradient losses on given advantages: how far a token may move, and what the trainer-sampler gap costs.

One optimizer step is taken per batch, so the only other policy is the one that sampled the tokens, and every ratio is
against its logprobs: exp(logp - logp_sampler). It also holds what a sampler with other kernels, or with older weights,
is off by; where the two engines agree and nothing is stale it is 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from posttrain.data.types import Batch
from posttrain.model.losses import Reads
from posttrain.model.output import Output


@dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """What the losses below share: the pull towards a frozen reference, and the metrics."""

    temperature: float
    kl_coef: float = 0.0
    """Weight of KL(policy || reference), where the batch carries the reference's logprobs."""
    kl_estimator: str = "k3"
    """k1, k2 or k3 of http://joschu.net/blog/kl-approx.html."""

    def finish(self, loss: Tensor, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with its KL term, and how far trainer, sampler and reference are apart."""
        gap = _gap(output, batch).detach()
        mask = batch.loss_mask
        metrics = {
            "entropy": (mask * output.entropy).sum(),
            "mismatch_kl": (mask * (gap.exp() - 1 - gap)).sum(),
            "mismatch_abs": (mask * gap.abs()).sum(),
        }
        if batch.ref_logprobs is not None:
            kl = (mask * kl_estimate(output.logprobs, batch.ref_logprobs, self.kl_estimator)).sum()
            loss = loss + self.kl_coef * kl
            metrics["kl"] = kl.detach()
        return loss, metrics


@dataclass(frozen=True, kw_only=True)
class TruncatedLoss(PolicyGradient):
    """-sum_t m_t min(r_t, importance_cap) A_t log p_t with the weight detached: truncated importance sampling.

    Every token keeps its gradient, however far it is (IMPALA's rho, arXiv:1802.01561; CISPO, arXiv:2506.13585, eq. 4,
    without a lower bound). On policy it is REINFORCE, and GRPO (arXiv:2402.03300, eq. 3) at its first step.
    """

    reads: ClassVar[Reads] = "tokens"
    importance_cap: float = 2.0

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return _truncated(self, _gap(output, batch).detach().exp(), output, batch)


@dataclass(frozen=True, kw_only=True)
class SequenceTruncatedLoss(PolicyGradient):
    """TruncatedLoss with one weight a sequence, min(prod_t r_t, importance_cap): the importance of the completion as a
    whole, without the bias that a weight a token has, at a larger variance (TRL's sequence_truncate).

    The product is over the tokens that carry loss, each once, whatever their weights.
    """

    reads: ClassVar[Reads] = "sequences"
    importance_cap: float = 2.0

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        documents, sums, _ = _by_sequence(_gap(output, batch).detach(), batch)
        return _truncated(self, sums[documents].exp(), output, batch)


@dataclass(frozen=True, kw_only=True)
class UncorrectedLoss(PolicyGradient):
    """-sum_t m_t A_t log p_t, as if the trainer itself had sampled: biased by all that its logprobs differ from the
    sampler's. It is what the others are compared with (benchmarks/rl_learning.py)."""

    reads: ClassVar[Reads] = "tokens"

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.advantages is not None, "policy gradients read rollouts"
        terms = _score(output) * batch.advantages
        return self.finish(-(batch.loss_mask * terms).sum(), output, batch)


@dataclass(frozen=True, kw_only=True)
class ClippedLoss(PolicyGradient):
    """-sum_t m_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t): a token that moved too far gives no gradient.

    PPO, arXiv:1707.06347, eq. 7; GRPO, arXiv:2402.03300, eq. 3; with high above low DAPO's clip-higher,
    arXiv:2503.14476, eq. 10.
    """

    reads: ClassVar[Reads] = "tokens"
    low: float = 0.2
    high: float = 0.2

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return _clipped(self, _gap(output, batch).exp(), output, batch)


@dataclass(frozen=True, kw_only=True)
class SequenceLoss(PolicyGradient):
    """ClippedLoss on one ratio a sequence, s_i = exp(mean_t (logp_t - logp_sampler_t)) (GSPO, arXiv:2507.18071, eq. 5).

    Its mean is over the tokens that carry loss, each once, whatever their weights. Low and high are of another order
    than a token's: the paper takes 3e-4 and 4e-4.
    """

    reads: ClassVar[Reads] = "sequences"
    low: float = 3e-4
    high: float = 4e-4

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        documents, sums, counts = _by_sequence(_gap(output, batch), batch)
        return _clipped(self, (sums / counts.clamp(min=1))[documents].exp(), output, batch)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Estimate of KL(policy || reference) at each sampled token, [N], nats.

    k1: log p - log ref, unbiased and without gradient on average; k2: half its square; k3: ref/p - 1 - log ref/p,
    unbiased and never negative.
    """
    gap = ref_logprobs - logprobs
    match kind:
        case "k1":
            return -gap
        case "k2":
            return gap.square() / 2
        case "k3":
            return gap.exp() - gap - 1
    raise AssertionError(f"kl_estimator {kind!r} is none of k1, k2, k3")


def _gap(output: Output, batch: Batch) -> Tensor:
    """[N] log of the trainer's over the sampler's probability of each token."""
    assert batch.advantages is not None and batch.sampler_logprobs is not None, "policy gradients read rollouts"
    return output.logprobs - batch.sampler_logprobs


def _by_sequence(rows: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """[N] document of each row; sums of `rows` and counts of them, by document."""
    documents = batch.doc_id[batch.loss_idx]
    zeros = rows.new_zeros(len(batch.cu_seqlens))
    return documents, zeros.index_add(0, documents, rows), zeros.index_add(0, documents, torch.ones_like(rows))


def _score(output: Output) -> Tensor:
    """[N] 1 in value with the gradient of log p: a sum of it reads as the objective that it estimates."""
    return (output.logprobs - output.logprobs.detach()).exp()


def _truncated(
    loss: TruncatedLoss | SequenceTruncatedLoss, importance: Tensor, output: Output, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    assert batch.advantages is not None
    terms = importance.clamp(max=loss.importance_cap) * _score(output) * batch.advantages
    total, metrics = loss.finish(-(batch.loss_mask * terms).sum(), output, batch)
    return total, metrics | {"importance_clipped": (batch.loss_mask * (importance > loss.importance_cap)).sum()}


def _clipped(
    loss: ClippedLoss | SequenceLoss, ratio: Tensor, output: Output, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    advantages, mask = batch.advantages, batch.loss_mask
    assert advantages is not None
    bounded = ratio.clamp(1 - loss.low, 1 + loss.high)
    total, metrics = loss.finish(-(mask * torch.minimum(ratio * advantages, bounded * advantages)).sum(), output, batch)
    stopped = bounded * advantages < ratio * advantages
    return total, metrics | {"ratio_clipped": (mask * stopped).sum()}
