"""Losses of reward models: per-document scores of one or several heads in, a sum over pairs or documents out."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, one_hot

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
    bins: int = 0
    """Of the probability that the answer with the higher score wins; above 0 the metrics tell how often it does in each
    (see workflow/calibration.py)."""

    @property
    def task(self) -> str:
        """What MultiTaskLoss calls this loss in its metrics."""
        return self.head

    @property
    def temperature(self) -> float:
        """Answers of others are scored as they are."""
        return 1.0

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        scores = _scores(output, self.head).squeeze(-1)
        assert len(scores) % 2 == 0, f"{len(scores)} documents are not pairs"
        chosen, rejected = scores[0::2], scores[1::2]
        logit = chosen - rejected
        if "margin" in batch.fields:
            logit = logit - batch.fields["margin"][0::2]
        loss = -logsigmoid(logit).sum()
        if self.center_coef:
            loss = loss + self.center_coef * (chosen + rejected).square().sum()
        chosen, rejected = chosen.detach(), rejected.detach()
        metrics = {
            "accuracy": (chosen > rejected).sum(),
            "margin": (chosen - rejected).sum(),
            "chosen_score": chosen.sum(),
            "rejected_score": rejected.sum(),
        }
        return loss, metrics | _binned(chosen - rejected, chosen > rejected, self.bins)


@dataclass(frozen=True)
class PointwiseLoss:
    """Sum over documents of a distance between one head's score and the label batch.fields[label].

    A document whose label is NaN has none, and adds nothing; metrics say what share is `labelled`.

    - mse: (score - label)^2, for ratings on a scale.
    - bce: -label log sigmoid(score) - (1 - label) log sigmoid(-score), for labels in [0, 1]; the score is a logit.
    """

    reads: ClassVar[Reads] = "scores"
    documents_per_unit: ClassVar[int] = 1
    kind: Literal["mse", "bce"]
    label: str
    head: str = "score"
    column: int = 0
    """Which of the head's outputs."""
    outputs: int = 1
    """Outputs of the head."""
    bins: int = 0
    """bce: as in BradleyTerryLoss, of the probability of the likelier label."""

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
        scores, labels = _scores(output, self.head, self.outputs)[:, self.column], batch.fields[self.label]
        assert scores.shape == labels.shape, f"{len(scores)} scores for {len(labels)} labels"
        known = ~labels.isnan()
        # Chosen by where(), not by an index, whose size the host would have to wait for.
        scores, labels = scores.where(known, 0), labels.where(known, 0)
        measured = scores.detach()
        match self.kind:
            case "mse":
                loss = (scores - labels).square().sum()
                metrics = {"abs_error": (measured - labels).abs().sum()}
            case "bce":
                losses = binary_cross_entropy_with_logits(scores, labels, reduction="none")
                loss = losses.where(known, 0).sum()
                right = ((measured > 0) == (labels > 0.5)) & known
                metrics = {"accuracy": right.sum(), **_binned(measured, right, self.bins)}
        return loss, metrics | {"score": measured.sum(), "label": labels.sum(), "labelled": known.sum()}


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


def _scores(output: Output, head: str, outputs: int = 1) -> Tensor:
    """[S, outputs] float32 scores of a head."""
    scores = output.scores[head]
    assert scores.dim() == 2 and scores.shape[1] == outputs, f"{head!r} gives {scores.shape}, not [S, {outputs}]"
    return scores


def _binned(logit: Tensor, right: Tensor, bins: int) -> dict[str, Tensor]:
    """Sums over predictions [n], by how sure they are: sigmoid(|logit|), from 0.5 to 1, in `bins` equal parts."""
    if not bins:
        return {}
    sure = logit.abs().sigmoid()
    members = one_hot(((sure - 0.5) * 2 * bins).long().clamp(max=bins - 1), bins).to(sure.dtype)
    sums = {"count": members.sum(0), "confidence": sure @ members, "accuracy": right.to(sure.dtype) @ members}
    return {f"bin_{number}/{name}": value[number] for name, value in sums.items() for number in range(bins)}
