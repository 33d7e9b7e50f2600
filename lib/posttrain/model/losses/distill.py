"""Distillation: a student drawn to a teacher's next-token distributions, whole or known by their top k.

TopKDistillLoss takes logprobs that a teacher wrote down earlier. DivergenceLoss takes both
models' logits, a chunk of rows at a time, and returns the gradient with the value: the
chunk's logits are the largest tensors of the step, and autograd would keep several copies.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from posttrain.data.types import Batch
from posttrain.model.losses import Reads
from posttrain.model.output import Output

TAIL_FLOOR = 1e-6
"""Least mass that the bucket outside the top k is given: float32 knows 1 - sum p no better than to about 1e-7."""


@dataclass(frozen=True)
class TopKDistillLoss:
    """Sum over loss tokens of m_t D_t, D_t a divergence over the teacher's k likeliest tokens of position t.

    With p the teacher and q the student, over the k tokens and, under `tail`, one bucket for all others
    with p_rest = 1 - sum_k p_k and q_rest = 1 - sum_k q_k:

    - forward_kl: KL(p || q) = sum p (log p - log q), which covers the teacher.
    - reverse_kl: KL(q || p) = sum q (log q - log p), which seeks its mode.
    - jsd: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, as DivergenceLoss has it.

    With the bucket this never exceeds the divergence over the whole vocabulary (data processing inequality)
    and holds the student's mass outside the top k down. Without it, p and q are renormalised over the k
    tokens, and the student is free in how much mass it leaves outside.
    """

    reads: ClassVar[Reads] = "tokens"
    kind: Literal["forward_kl", "reverse_kl", "jsd"]
    beta: float = 0.5
    tail: bool = True
    temperature: float = 1.0

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        student, teacher, weights = output.teacher_logprobs, batch.teacher_logprobs, batch.loss_mask
        assert student is not None and teacher is not None, "top-k distillation reads a teacher's logprobs"
        metrics = {
            "entropy": (weights * output.entropy).sum(),
            "teacher_mass": (weights * teacher.exp().sum(-1)).sum(),
            "student_mass": (weights * student.detach().exp().sum(-1)).sum(),
        }
        return (weights * self._divergence(self._complete(student), self._complete(teacher))).sum(), metrics

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[N] nats, of log probabilities [N, K+1]."""
        match self.kind:
            case "forward_kl":
                return _kl(teacher, student)
            case "reverse_kl":
                return _kl(student, teacher)
            case "jsd":
                mixture = torch.logaddexp(teacher + math.log(self.beta), student + math.log1p(-self.beta))
                return self.beta * _kl(teacher, mixture) + (1 - self.beta) * _kl(student, mixture)

    def _complete(self, logprobs: Tensor) -> Tensor:
        """[N, K] -> [N, K+1] with the log of the mass outside the top k, or [N, K] renormalised; nats."""
        inside = logprobs.logsumexp(-1, keepdim=True)
        if not self.tail:
            return logprobs - inside
        outside = (-torch.expm1(inside.clamp(max=math.log1p(-TAIL_FLOOR)))).log()
        return torch.cat([logprobs, outside], dim=-1)


@dataclass(frozen=True)
class DivergenceLoss:
    """Sum over loss tokens of m_t D_t over the whole vocabulary, with p_t and p_s of teacher and student at T.

    - forward_kl: KL(p_t || p_s).
    - reverse_kl: KL(p_s || p_t).
    - jsd: beta KL(p_t || m) + (1 - beta) KL(p_s || m), m = beta p_t + (1 - beta) p_s (generalised
      Jensen-Shannon, GKD, arXiv:2306.13649, eq. 1). At beta 0 and 1, where it vanishes, it means forward_kl
      and reverse_kl, the limits of jsd / beta and jsd / (1 - beta) and TRL's convention.

    D is not multiplied by T^2. `beta` is read by jsd alone.
    """

    reads: ClassVar[Reads] = "teacher"
    kind: Literal["forward_kl", "reverse_kl", "jsd"]
    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self):
        assert 0 <= self.beta <= 1, f"beta {self.beta} mixes no distributions"

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        raise AssertionError("an Output holds no distributions: the forward pass sums m_t D_t from rows() itself")

    @torch.no_grad()
    def rows(self, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Divergence of each row and its gradient, without autograd.

        With s, t, m the distributions, the gradient with respect to the student's raw logits is
        forward_kl (s - t) / T; reverse_kl s (log s - log t - KL) / T; jsd (1 - beta) s (log(s/m) - KL(s || m)) / T.
        The last: dD/ds = (1 - beta) log(s/m) + (1 - beta)(1 - (beta t + (1 - beta) s) / m), whose second
        term is zero, and the softmax turns g = dD/ds into s (g - sum s g) / T.

        Args:
            student_logits: [n, V] raw logits of any float dtype, finite; not changed.
            teacher_logits: [n, V] likewise, over the same vocabulary.

        Returns:
            [n] float32 nats, and [n, V] float32 d divergence / d student_logits. Beside the inputs it holds
            three [n, V] float32 tensors, four for jsd, the result among them.
        """
        student = _logprobs(student_logits, self.temperature)
        teacher = _logprobs(teacher_logits, self.temperature)
        match self.kind, self.beta:
            case ("forward_kl", _) | ("jsd", 0):
                divergence, gradient = _forward_kl(student, teacher)
            case ("reverse_kl", _) | ("jsd", 1):
                divergence, gradient = _reverse_kl(student, teacher)
            case _:
                divergence, gradient = _jsd(student, teacher, self.beta)
        return divergence, gradient.div_(self.temperature)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """[N] KL(p || q) of log probabilities [N, K]."""
    return (p.exp() * (p - q)).sum(-1)


def _logprobs(logits: Tensor, temperature: float) -> Tensor:
    """[n, V] float32 nats in a tensor of its own, which what follows may overwrite."""
    scaled = logits.to(torch.float32, copy=True).div_(temperature)
    # The largest first: rounding then goes with the log of the mass below it, near zero, not with the logits' size.
    scaled.sub_(scaled.amax(-1, keepdim=True))
    return scaled.sub_(scaled.logsumexp(-1, keepdim=True))


def _forward_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(t || s) [n] and its gradient in the scaled logits [n, V]; both inputs are overwritten."""
    p_teacher = teacher.exp()
    divergence = teacher.sub_(student).mul_(p_teacher).sum(-1)
    return divergence, student.exp_().sub_(p_teacher)


def _reverse_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(s || t) [n] and its gradient in the scaled logits [n, V]; both inputs are overwritten."""
    p_student = student.exp()
    gap = student.sub_(teacher)
    divergence = torch.mul(p_student, gap, out=teacher).sum(-1)
    return divergence, gap.sub_(divergence[:, None]).mul_(p_student)


def _jsd(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Generalised JSD [n] and its gradient in the scaled logits [n, V]; both inputs are overwritten."""
    # log m, with one constant factored out so that only one of the two terms needs a copy.
    mixture = student + (math.log1p(-beta) - math.log(beta))
    torch.logaddexp(mixture, teacher, out=mixture).add_(math.log(beta))
    p_teacher = teacher.exp()
    from_teacher = teacher.sub_(mixture).mul_(p_teacher).sum(-1)
    from_student, gradient = _reverse_kl(student, mixture)
    return beta * from_teacher + (1 - beta) * from_student, gradient.mul_(1 - beta)
