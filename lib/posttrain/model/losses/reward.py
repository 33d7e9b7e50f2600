"""Losses of reward models: per-document scores of one or several heads in, a sum over pairs or documents out."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from posttrain.data.types import Batch
from posttrain.model.losses import Reads
from posttrain.model.output import Output


@dataclass(frozen=True)
class BradleyTerryLoss:
    """Sum over pairs of -log sigmoid(r_w - r_l - margin) + center_coef (r_w + r_l)^2.

    Bradley-Terry preferences as in InstructGPT (arXiv:2203.02155, eq. 1), with the optional margin of
    Llama 2 (arXiv:2307.09288, eq. 2) and the centering of arXiv:2312.09244, which keeps scores near zero.

    Documents 2i and 2i+1 are the chosen and the rejected of pair i. A pair's margin is
    batch.fields["margin"] of its chosen document, zero where the batch has no such field.
    """

    reads: ClassVar[Reads] = "scores"
    documents_per_unit: ClassVar[int] = 2
    head: str = "score"
    center_coef: float = 0.0

    @property
    def task(self) -> str:
        """What MultiTaskLoss calls this loss in its metrics."""
        return self.head

    @property
    def temperature(self) -> float:
        """Answers of others are scored as they are."""
        return 1.0

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        scores = _scores(output, self.head)
        assert len(scores) % 2 == 0, f"{len(scores)} documents are not pairs"
        chosen, rejected = scores[0::2], scores[1::2]
        logit = chosen - rejected
        if "margin" in batch.fields:
            logit = logit - batch.fields["margin"][0::2]
        loss = -logsigmoid(logit).sum()
        if self.center_coef:
            loss = loss + self.center_coef * (chosen + rejected).square().sum()
        chosen, rejected = chosen.detach(), rejected.detach()
        return loss, {
            "accuracy": (chosen > rejected).sum(),
            "margin": (chosen - rejected).sum(),
            "chosen_score": chosen.sum(),
            "rejected_score": rejected.sum(),
        }


@dataclass(frozen=True)
class PointwiseLoss:
    """Sum over documents of a distance between one head's score and the label batch.fields[label].

    - mse: (score - label)^2, for ratings on a scale.
    - bce: -label log sigmoid(score) - (1 - label) log sigmoid(-score), for labels in [0, 1]; the score is a logit.
    """

    reads: ClassVar[Reads] = "scores"
    documents_per_unit: ClassVar[int] = 1
    kind: Literal["mse", "bce"]
    label: str
    head: str = "score"

    @property
    def task(self) -> str:
        """What MultiTaskLoss calls this loss in its metrics."""
        return self.label

    @property
    def temperature(self) -> float:
        """Answers of others are scored as they are."""
        return 1.0

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.label in batch.fields, f"no document has a label {self.label!r}"
        scores, labels = _scores(output, self.head), batch.fields[self.label]
        assert scores.shape == labels.shape, f"{len(scores)} scores for {len(labels)} labels"
        measured = scores.detach()
        match self.kind:
            case "mse":
                loss = (scores - labels).square().sum()
                metrics = {"abs_error": (measured - labels).abs().sum()}
            case "bce":
                loss = binary_cross_entropy_with_logits(scores, labels, reduction="sum")
                metrics = {"accuracy": ((measured > 0) == (labels > 0.5)).sum()}
        return loss, metrics | {"score": measured.sum(), "label": labels.sum()}


@dataclass(frozen=True)
class MultiTaskLoss:
    """sum_i weight_i L_i over losses of one batch, each part's metrics under its task's name: `helpful/accuracy`.

    All parts share one count. Where one part counts pairs, a part that counts documents enters as its
    mean over the pair's documents, so that every metric stays a mean once the engine has divided.
    """

    reads: ClassVar[Reads] = "scores"
    parts: tuple[tuple[float, BradleyTerryLoss | PointwiseLoss], ...]

    def __post_init__(self):
        tasks = [part.task for _, part in self.parts]
        assert tasks and len(set(tasks)) == len(tasks), f"parts need different names: {tasks}"

    @property
    def documents_per_unit(self) -> int:
        """Documents in one of what the engine counts: 2 where a part reads pairs, else 1."""
        return max(part.documents_per_unit for _, part in self.parts)

    @property
    def temperature(self) -> float:
        """Answers of others are scored as they are."""
        return 1.0

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses, metrics = [], {}
        for weight, part in self.parts:
            share = part.documents_per_unit / self.documents_per_unit
            loss, sums = part(output, batch)
            losses.append(weight * share * loss)
            for name, value in {"loss": loss.detach(), **sums}.items():
                metrics[f"{part.task}/{name}"] = share * value
        return torch.stack(losses).sum(), metrics


def _scores(output: Output, head: str) -> Tensor:
    """[S] float32 scores of a head that gives one number a document."""
    scores = output.scores[head]
    assert scores.dim() == 2 and scores.shape[1] == 1, f"head {head!r} gives {tuple(scores.shape)}, not [S, 1]"
    return scores.squeeze(-1)
