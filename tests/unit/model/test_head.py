"""The chunked LM head against plain float64 formulas: values, gradients, padding, chunk borders, one pass or two."""

import pytest
import torch
from torch import Tensor

from posttrain.model import head as head_module
from posttrain.model.head import Head, divergence_loss, logprobs_and_entropy, row_loss
from posttrain.model.losses.distill import DivergenceLoss

VOCAB, PADDED, D = 50, 64, 16


def inputs(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, targets [rows, 3] with a token twice, and an upstream weight for each."""
    torch.manual_seed(rows)
    hidden = torch.randn(rows, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(PADDED, D, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, VOCAB, (rows, 3))
    targets[:, 2] = targets[:, 0]
    return hidden, weight, targets, torch.randn(rows, 3, dtype=dtype)


def plain(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax((hidden @ weight.T)[:, :VOCAB] / temperature, -1)


@pytest.mark.parametrize(("rows", "chunk"), [(0, 4), (1, 4), (7, 4), (8, 4), (9, 4), (9, 1024)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_of_both_ways_equal_the_plain_formula(monkeypatch, rows, chunk, temperature):
    monkeypatch.setattr(head_module, "CHUNK_ROWS", chunk)
    hidden, weight, targets, upstream = inputs(rows)
    log_p = plain(hidden, weight, temperature)
    expected = log_p.gather(1, targets)
    loss = (expected * upstream).sum()
    gradients = torch.autograd.grad(loss, (hidden, weight))
    head = Head(vocab_size=VOCAB, temperature=temperature)

    got, entropy = logprobs_and_entropy(hidden, weight, targets, head)
    torch.testing.assert_close(got.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1).detach(), atol=1e-5, rtol=1e-5)
    seen = []

    def chunk_loss(rows: slice, logprobs: Tensor, entropy: Tensor) -> Tensor:
        seen.append(rows)
        return (logprobs * upstream[rows]).sum()

    once = row_loss(hidden, weight, targets, head, chunk_loss)
    torch.testing.assert_close(once.double(), loss.detach(), atol=1e-4, rtol=1e-5)
    assert [r.start for r in seen[1:]] == [r.stop for r in seen[:-1]] and sum(r.stop - r.start for r in seen) == rows
    for made in ((got * upstream).sum(), once):
        ours = torch.autograd.grad(made, (hidden, weight))
        for mine, theirs in zip(ours, gradients, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
        assert not ours[1][VOCAB:].any(), "rows that pad the vocabulary get no gradient"


def test_a_loss_that_was_scaled_after_its_gradients_were_made_is_refused():
    hidden, weight, targets, _ = inputs(5)
    loss = row_loss(hidden, weight, targets, Head(vocab_size=VOCAB), lambda rows, lp, _: lp.sum())
    with pytest.raises(RuntimeError, match="scaled afterwards"):
        torch.autograd.grad(loss / 2, (hidden, weight))


def test_a_loss_of_a_row_need_not_be_linear_in_its_logprob():
    hidden, weight, targets, _ = inputs(6)
    expected = plain(hidden, weight, 1.0).gather(1, targets).exp().square().sum()
    got = row_loss(hidden, weight, targets, Head(vocab_size=VOCAB), lambda rows, lp, _: lp.exp().square().sum())
    for mine, theirs in zip(
        torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_a_frozen_head_costs_no_gradient_of_its_weight(monkeypatch):
    hidden, weight, targets, _ = inputs(5)
    calls = []
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *a: calls.append(a))
    loss = row_loss(hidden, weight.detach(), targets, Head(vocab_size=VOCAB), lambda rows, lp, _: lp.sum())
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient.shape == hidden.shape and not calls


def test_a_sure_prediction_keeps_its_gradient_in_bfloat16():
    """softmax - 1 at the target is 1e-3 here; with both terms rounded to bfloat16 first it would be nought."""
    hidden = torch.zeros(1, D, dtype=torch.bfloat16)
    hidden[0, 0] = 1
    weight = torch.zeros(PADDED, D, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        weight[3, 0] = 10.75
    leaf = hidden.requires_grad_()
    head = Head(vocab_size=VOCAB)
    loss = row_loss(leaf, weight, torch.tensor([[3]]), head, lambda rows, lp, _: -lp.sum())
    (gradient,) = torch.autograd.grad(loss, weight)
    expected = plain(hidden.detach().double(), weight.detach().double(), 1.0).exp()[0, 3] - 1
    assert float(gradient[3, 0]) == pytest.approx(float(expected), rel=5e-3)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_divergences_through_the_head_equal_the_plain_formula(monkeypatch, beta):
    monkeypatch.setattr(head_module, "CHUNK_ROWS", 32)
    hidden, weight, _, _ = inputs(11)
    torch.manual_seed(1)
    teacher_hidden, teacher_weight = torch.randn(11, 9).double(), torch.randn(PADDED + 64, 9).double()
    weights = torch.rand(11).double()
    loss_fn = DivergenceLoss(kind="jsd", beta=beta, temperature=1.5)

    def distance(rows: slice, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = loss_fn.rows(student, teacher)
        return (weights[rows] * value).sum(), gradient * weights[rows, None]

    student = plain(hidden, weight, 1.5)
    teacher = torch.log_softmax((teacher_hidden @ teacher_weight.T)[:, :VOCAB] / 1.5, -1)
    if beta in (0.0, 1.0):
        a, b = (teacher, student) if beta == 0.0 else (student, teacher)
        rows = (a.exp() * (a - b)).sum(-1)
    else:
        mixture = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
        rows = beta * (teacher.exp() * (teacher - mixture)).sum(-1)
        rows = rows + (1 - beta) * (student.exp() * (student - mixture)).sum(-1)
    expected = (weights * rows).sum()
    got = divergence_loss(hidden, weight, teacher_hidden, teacher_weight, Head(vocab_size=VOCAB), distance)
    torch.testing.assert_close(got.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
