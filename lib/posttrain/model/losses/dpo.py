"""Preference losses over pairs of documents: DPO and its relatives, from per-token logprobs to a sum over pairs.

A pair is two consecutive documents of a batch, chosen first. Units never split over packs,
so an even document is always a chosen one; the padded tail's documents come last and are cut.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.data.types import Batch
from posttrain.model.losses import Reads
from posttrain.model.output import Output


@dataclass(frozen=True)
class DPOLoss:
    """Sum over pairs of f(s_w - s_l) - sft_coef * log p(y_w) / |y_w|, for chosen w and rejected l.

    A document's score is s = sum_t m_t (log p_t - log p_ref,t), with m_t the loss weights;
    `reference_free` drops log p_ref, `length_normalised` divides s by |y| = sum_t m_t. With
    h = beta (s_w - s_l) - gamma, f is by kind

    - sigmoid: -log sigmoid(h) (DPO, arXiv:2305.18290, eq. 7). Under `label_smoothing` e it is
      -(1 - e) log sigmoid(h) - e log sigmoid(-h): conservative DPO, for labels wrong with probability e.
    - hinge: max(0, 1 - h) (SLiC-HF, arXiv:2305.10425, on the same scores).
    - ipo: (s_w - s_l - 1 / (2 beta))^2 (IPO, arXiv:2310.12036, eq. 17). With `length_normalised`
      the target does not depend on length, which is how TRL reads the paper.

    SimPO (arXiv:2405.14734, eq. 6) is sigmoid, reference-free and length-normalised, with `gamma` its
    target margin in reward units. The SFT term is a mean over the tokens of each chosen document, then a
    sum over pairs (RPO, arXiv:2404.19733, eq. 1), so that packing cannot change it.

    The reference is batch.ref_logprobs [N] where present, else batch.fields["ref_logprob"] [S], each
    document's sum under the same loss weights. Sums are taken in the dtype of the logprobs, float32;
    index_add gives the same bits every time on CPU, on CUDA only under torch.use_deterministic_algorithms.
    """

    reads: ClassVar[Reads] = "documents"
    beta: float
    kind: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    sft_coef: float = 0.0
    gamma: float = 0.0
    length_normalised: bool = False
    reference_free: bool = False

    def __post_init__(self):
        assert self.beta > 0, f"beta {self.beta} would make every pair alike"
        assert 0 <= self.label_smoothing < 0.5, f"label_smoothing {self.label_smoothing} would reverse the labels"
        assert self.kind == "sigmoid" or not self.label_smoothing, "label smoothing is defined for sigmoid"
        assert self.kind != "ipo" or not self.gamma, "IPO has its margin in beta"

    @property
    def temperature(self) -> float:
        """Answers of others are scored as they are."""
        return 1.0

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        weights = batch.loss_mask
        logprob, tokens = _by_pair(weights * output.logprobs, batch), _by_pair(weights, batch)
        length = torch.where(tokens > 0, tokens, 1)
        score = self._scores(output.logprobs, logprob, batch)
        if self.length_normalised:
            score = score / length
        loss = self._pair_losses(score[:, 0] - score[:, 1])
        if self.sft_coef:
            loss = loss - self.sft_coef * logprob[:, 0] / length[:, 0]
        reward, logprob = self.beta * score.detach(), logprob.detach()
        metrics = {
            "accuracy": reward[:, 0] > reward[:, 1],
            "margin": reward[:, 0] - reward[:, 1],
            "chosen_reward": reward[:, 0],
            "rejected_reward": reward[:, 1],
            "chosen_logprob": logprob[:, 0],
            "rejected_logprob": logprob[:, 1],
        }
        return loss.sum(), {name: value.sum() for name, value in metrics.items()}

    def _scores(self, logprobs: Tensor, logprob: Tensor, batch: Batch) -> Tensor:
        """[P, 2] log ratios to the reference, nats; sums of `logprobs` alone where there is none."""
        if self.reference_free:
            return logprob
        if batch.ref_logprobs is not None:
            # Differences first: sums of thousands of nats would leave float32 few digits for their difference.
            return _by_pair(batch.loss_mask * (logprobs - batch.ref_logprobs), batch)
        assert "ref_logprob" in batch.fields, "DPO reads ref_logprobs or fields['ref_logprob'], or is reference_free"
        return logprob - batch.fields["ref_logprob"].view_as(logprob)

    def _pair_losses(self, difference: Tensor) -> Tensor:
        """[P] f of the class docstring, of `difference` = s_w - s_l [P]."""
        logit = self.beta * difference - self.gamma
        match self.kind:
            case "sigmoid":
                smooth = self.label_smoothing
                return -(1 - smooth) * logsigmoid(logit) - smooth * logsigmoid(-logit)
            case "hinge":
                return (1 - logit).relu()
            case "ipo":
                return (difference - 1 / (2 * self.beta)).square()


def _by_pair(rows: Tensor, batch: Batch) -> Tensor:
    """[N] -> [P, 2] sums over the rows of each chosen and rejected document."""
    assert batch.num_samples % 2 == 0, f"{batch.num_samples} documents are not pairs"
    sums = rows.new_zeros(batch.num_samples).index_add(0, batch.doc_id[batch.loss_idx], rows)
    return sums.view(-1, 2)
