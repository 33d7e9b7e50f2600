"""Distillation losses against float64 formulas and TRL's functions, analytic gradients against float64 autograd."""

from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.sdpo.loss_utils import add_tail_bucket, compute_divergence
from trl.experimental.server_distillation.server_distillation_trainer import ServerDistillationTrainer

from loss_batch import loss_batch
from posttrain.model.losses.distill import DivergenceLoss, TopKDistillLoss
from posttrain.model.output import Output

DIRECTIONS: tuple[Literal["forward_kl", "reverse_kl", "jsd"], ...] = ("forward_kl", "reverse_kl", "jsd")
KINDS = [
    ("forward_kl", 0.5),
    ("reverse_kl", 0.5),
    ("jsd", 0.0),
    ("jsd", 0.1),
    ("jsd", 0.5),
    ("jsd", 0.9),
    ("jsd", 1.0),
]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """[...] KL(p || q) of log probabilities [..., V]."""
    return (p.exp() * (p - q)).sum(-1)


def divergence(kind: str, beta: float, student: Tensor, teacher: Tensor) -> Tensor:
    """[n] the papers' formulas, of log probabilities [n, V]."""
    match kind, beta:
        case ("forward_kl", _) | ("jsd", 0.0):
            return kl(teacher, student)
        case ("reverse_kl", _) | ("jsd", 1.0):
            return kl(student, teacher)
    mixture = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def top_k(n: int = 5, vocab: int = 11, k: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float64: both models' logits [n, vocab], the teacher's top ids and their log probabilities [n, k]."""
    torch.manual_seed(0)
    student, teacher = torch.randn(n, vocab, dtype=torch.float64), 2 * torch.randn(n, vocab, dtype=torch.float64)
    logprobs, ids = torch.log_softmax(teacher, -1).topk(k, -1)
    return student, teacher, ids, logprobs


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("kind", DIRECTIONS)
def test_top_k_divergence_and_its_gradient_equal_the_formula(kind, tail: bool):
    logits, teacher_logits, ids, known = top_k()
    mask = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0], dtype=torch.float64)

    def expected(student_logits: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row, weight in enumerate(mask):
            sides = []
            for values in (student_logits, teacher_logits):
                p = torch.softmax(values[row], -1)
                kept = p[ids[row]]
                kept = torch.cat([kept, (p.sum() - kept.sum())[None]]) if tail else kept / kept.sum()
                sides.append(kept.log())
            total = total + weight * divergence(kind, 0.5, sides[0], sides[1])
        return total

    leaf = logits.clone().requires_grad_()
    logprobs = torch.log_softmax(leaf, -1).gather(-1, ids)
    output = Output(logprobs=logprobs[:, 0], entropy=torch.ones(5), teacher_logprobs=logprobs)
    loss, metrics = TopKDistillLoss(kind=kind, tail=tail)(output, loss_batch(mask, teacher_logprobs=known))
    reference = logits.clone().requires_grad_()
    torch.testing.assert_close(loss, expected(reference), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaf), torch.autograd.grad(expected(reference), reference), atol=1e-9, rtol=1e-9
    )
    assert metrics["teacher_mass"].item() == pytest.approx((mask * known.exp().sum(-1)).sum().item())
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_top_k_mixes_as_the_formula_says(beta: float):
    student, ids, known = top_k_logprobs()
    loss_fn = TopKDistillLoss(kind="jsd", beta=beta, tail=False)
    mine, theirs = (torch.log_softmax(each, -1) for each in (student.gather(-1, ids), known))
    torch.testing.assert_close(
        top_k_loss(loss_fn, student.gather(-1, ids), known), divergence("jsd", beta, mine, theirs).sum()
    )


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_top_k_with_a_tail_is_exact_over_the_whole_vocabulary_and_never_above_it(kind):
    logits, teacher_logits, _, _ = top_k()
    student, teacher = torch.log_softmax(logits, -1), torch.log_softmax(teacher_logits, -1)
    full, previous = divergence(kind, 0.5, student, teacher).sum(), 0.0
    for k in range(1, 11):
        known, ids = teacher.topk(k, -1)
        output = Output(logprobs=student[:, 0], entropy=torch.zeros(5), teacher_logprobs=student.gather(-1, ids))
        loss, _ = TopKDistillLoss(kind=kind)(output, loss_batch(torch.ones(5), teacher_logprobs=known))
        assert previous - 1e-9 <= loss.item() <= full.item() + 1e-9
        previous = loss.item()
    assert previous == pytest.approx(full.item(), abs=1e-9), "ten of eleven tokens and a bucket are all there is"


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_top_k_bears_a_top_k_that_holds_all_mass(kind):
    known = torch.tensor([[0.0, -40.0], [-1e-7, -20.0]])
    student = torch.tensor([[-30.0, 0.0], [0.0, -50.0]], requires_grad=True)
    output = Output(logprobs=student[:, 0], entropy=torch.zeros(2), teacher_logprobs=student)
    loss, _ = TopKDistillLoss(kind=kind)(output, loss_batch(torch.ones(2), teacher_logprobs=known))
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite() and gradient.isfinite().all()


def test_top_k_rows_are_independent():
    logits, _, ids, known = top_k()
    logprobs, mask = torch.log_softmax(logits, -1).gather(-1, ids), torch.rand(5, dtype=torch.float64)
    loss_fn, batch = TopKDistillLoss(kind="forward_kl"), loss_batch(mask, teacher_logprobs=known)

    def of(chosen: slice) -> Tensor:
        part = Output(logprobs=logprobs[chosen, 0], entropy=torch.zeros(5)[chosen], teacher_logprobs=logprobs[chosen])
        return loss_fn(part, batch.rows(chosen))[0]

    torch.testing.assert_close(of(slice(0, 2)) + of(slice(2, 5)), of(slice(0, 5)))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_rows_and_their_analytic_gradient_equal_float64_autograd(kind, beta: float, temperature: float):
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(6, 50), 3 * torch.randn(6, 50)
    kept = student.clone(), teacher.clone()
    got, gradient = DivergenceLoss(kind=kind, beta=beta, temperature=temperature).rows(student, teacher)

    leaf = student.double().requires_grad_()
    expected = divergence(
        kind, beta, torch.log_softmax(leaf / temperature, -1), torch.log_softmax(teacher.double() / temperature, -1)
    )
    (slopes,) = torch.autograd.grad(expected.sum(), leaf)
    assert got.dtype == gradient.dtype == torch.float32 and got.shape == (6,) and gradient.shape == (6, 50)
    torch.testing.assert_close(got.double(), expected.detach(), atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(gradient.double(), slopes, atol=1e-5, rtol=1e-5)
    assert torch.equal(student, kept[0]) and torch.equal(teacher, kept[1]), "the logits are the caller's"


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_rows_bear_extreme_logits(kind, beta: float):
    logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0], [-1e4, 1e4, 0.0]])
    loss_fn = DivergenceLoss(kind=kind, beta=beta)
    value, gradient = loss_fn.rows(logits, logits.flip(0))
    assert value.isfinite().all() and (value >= 0).all() and gradient.isfinite().all()
    value, gradient = loss_fn.rows(logits, logits + 100)
    torch.testing.assert_close(value, torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient, torch.zeros(3, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_compute_in_float32_whatever_the_logits_are(dtype: torch.dtype):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 20).to(dtype), torch.randn(3, 20).to(dtype)
    loss_fn = DivergenceLoss(kind="jsd")
    torch.testing.assert_close(
        loss_fn.rows(student, teacher), loss_fn.rows(student.float(), teacher.float()), atol=0, rtol=0
    )


def test_a_small_beta_approaches_the_convention_at_its_ends():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 20), torch.randn(3, 20)
    for near, end in ((1e-3, 0.0), (1 - 1e-3, 1.0)):
        value, gradient = DivergenceLoss(kind="jsd", beta=near).rows(student, teacher)
        at_end = DivergenceLoss(kind="jsd", beta=end).rows(student, teacher)
        torch.testing.assert_close((value * 1e3, gradient * 1e3), at_end, atol=5e-3, rtol=1e-2)


def test_divergence_is_not_made_from_an_output():
    output = Output(logprobs=torch.zeros(3), entropy=torch.zeros(3))
    with pytest.raises(AssertionError, match="rows"):
        DivergenceLoss(kind="jsd")(output, loss_batch(torch.ones(3)))


def top_k_logprobs() -> tuple[Tensor, Tensor, Tensor]:
    """float64: the student's log probabilities [n, vocab], the teacher's top ids and their log probabilities [n, k]."""
    student, _, ids, known = top_k()
    return torch.log_softmax(student, -1), ids, known


def top_k_loss(loss_fn: TopKDistillLoss, student: Tensor, teacher: Tensor) -> Tensor:
    output = Output(logprobs=student[:, 0], entropy=torch.zeros(len(student)), teacher_logprobs=student)
    return loss_fn(output, loss_batch(torch.ones(len(student), dtype=torch.float64), teacher_logprobs=teacher))[0]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_divergence_equals_the_function_of_trl(beta: float, temperature: float):
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(1, 8, 40), 3 * torch.randn(1, 8, 40)
    leaf = student.double().requires_grad_()
    theirs = GKDTrainer.generalized_jsd_loss(
        leaf, teacher.double(), beta=beta, temperature=temperature, reduction="sum"
    )
    (slopes,) = torch.autograd.grad(theirs, leaf)
    value, gradient = DivergenceLoss(kind="jsd", beta=beta, temperature=temperature).rows(student[0], teacher[0])
    torch.testing.assert_close(value.sum().double(), theirs.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), slopes[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_top_k_with_a_tail_equals_the_functions_of_trl(kind):
    student, ids, known = top_k_logprobs()
    alpha = {"forward_kl": 0.0, "reverse_kl": 1.0}[kind]
    theirs = compute_divergence(add_tail_bucket(student.gather(-1, ids)), add_tail_bucket(known), alpha).sum()
    torch.testing.assert_close(top_k_loss(TopKDistillLoss(kind=kind), student.gather(-1, ids), known), theirs)


@pytest.mark.parametrize("tail", [True, False])
def test_forward_top_k_equals_the_trainer_of_trl(tail: bool):
    student, ids, known = top_k_logprobs()
    trainer: Any = SimpleNamespace(
        loss_add_tail=tail, _reduce_divergence_loss=ServerDistillationTrainer._reduce_divergence_loss
    )
    theirs = ServerDistillationTrainer._compute_server_forward_kl_loss(
        trainer,
        {"topk_logprobs": known[None], "topk_token_ids": ids[None]},
        student[None],
        torch.zeros(1, len(student), dtype=torch.int64),
    )
    ours = top_k_loss(TopKDistillLoss(kind="forward_kl", tail=tail), student.gather(-1, ids), known)
    torch.testing.assert_close(ours / len(student), theirs)
