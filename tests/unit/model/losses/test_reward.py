"""Reward-model losses against plain float64 formulas."""

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain.data.batch import collate
from posttrain.data.types import Batch, Pack, Sample
from posttrain.model.losses.reward import BradleyTerryLoss, MultiTaskLoss, PointwiseLoss
from posttrain.model.output import Output

RNG = np.random.default_rng(0)
SCORES = RNG.normal(0, 2, 6)
MARGINS = RNG.uniform(0, 2, 6)
LABELS = RNG.uniform(0, 1, 6)


def batch_of(**fields: np.ndarray) -> Batch:
    """Six documents of three tokens and a padded tail."""
    ids, mask = np.arange(3, dtype=np.int32), np.ones(3, np.float32)
    samples = [
        Sample(
            input_ids=ids, target_ids=ids, loss_mask=mask, fields={k: float(column[i]) for k, column in fields.items()}
        )
        for i in range(6)
    ]
    batch = collate(Pack(samples=tuple(samples), num_units=3), pack_tokens=25)
    return replace(batch, fields={name: torch.tensor(column) for name, column in fields.items()})


def output_of(**scores: Tensor) -> Output:
    return Output(logprobs=torch.zeros(0), entropy=torch.zeros(0), scores=scores)


def leaf() -> Tensor:
    return torch.tensor(SCORES)[:, None].requires_grad_()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("center_coef", [0.0, 0.3])
@pytest.mark.parametrize("with_margin", [False, True])
def test_bradley_terry_and_its_gradient_equal_the_formula(with_margin: bool, center_coef: float):
    batch = batch_of(margin=MARGINS) if with_margin else batch_of()
    scores = leaf()
    loss, metrics = BradleyTerryLoss(center_coef=center_coef)(output_of(score=scores), batch)
    (gradient,) = torch.autograd.grad(loss, scores)

    expected, slopes = 0.0, np.zeros(6)
    for i in range(0, 6, 2):
        w, r = SCORES[i], SCORES[i + 1]
        gap = w - r - (MARGINS[i] if with_margin else 0)
        expected += -math.log(sigmoid(gap)) + center_coef * (w + r) ** 2
        slopes[i] = -sigmoid(-gap) + 2 * center_coef * (w + r)
        slopes[i + 1] = sigmoid(-gap) + 2 * center_coef * (w + r)
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    np.testing.assert_allclose(gradient.squeeze(-1).numpy(), slopes, atol=1e-9)
    assert metrics["accuracy"].item() == (SCORES[0::2] > SCORES[1::2]).sum()
    assert metrics["margin"].item() == pytest.approx((SCORES[0::2] - SCORES[1::2]).sum())
    assert metrics["chosen_score"].item() == pytest.approx(SCORES[0::2].sum())
    assert metrics["rejected_score"].item() == pytest.approx(SCORES[1::2].sum())


def test_pointwise_mse_equals_the_formula():
    scores = leaf()
    loss, metrics = PointwiseLoss(kind="mse", label="helpful")(output_of(score=scores), batch_of(helpful=LABELS))
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.item() == pytest.approx(((SCORES - LABELS) ** 2).sum(), abs=1e-9)
    np.testing.assert_allclose(gradient.squeeze(-1).numpy(), 2 * (SCORES - LABELS), atol=1e-9)
    assert metrics["abs_error"].item() == pytest.approx(np.abs(SCORES - LABELS).sum())


@pytest.mark.parametrize("kind", ["mse", "bce"])
@pytest.mark.fault("F41", outcome="CONTINUE")
def test_a_missing_label_adds_nothing_to_loss_gradient_or_metrics(kind: Literal["mse", "bce"]):
    known = np.array([True, False, True, True, False, True])
    scores = torch.tensor(np.stack([SCORES + 1, SCORES], axis=1)).requires_grad_()
    loss_fn = PointwiseLoss(kind=kind, label="long", column=1, outputs=2)
    loss, metrics = loss_fn(output_of(score=scores), batch_of(long=np.where(known, LABELS, np.nan)))
    (gradient,) = torch.autograd.grad(loss, scores)
    score, label = SCORES[known], LABELS[known]
    p = 1 / (1 + np.exp(-score))
    expected = (score - label) ** 2 if kind == "mse" else -(label * np.log(p) + (1 - label) * np.log(1 - p))
    slope = 2 * (score - label) if kind == "mse" else p - label
    assert loss.item() == pytest.approx(expected.sum(), abs=1e-9)
    np.testing.assert_allclose(gradient[known, 1].numpy(), slope, atol=1e-9)
    assert not gradient[:, 0].any() and not gradient[~known].any()
    assert metrics["labelled"].item() == known.sum() and metrics["label"].item() == pytest.approx(label.sum())
    if kind == "mse":
        assert metrics["abs_error"].item() == pytest.approx(np.abs(score - label).sum())
    else:
        assert metrics["accuracy"].item() == ((score > 0) == (label > 0.5)).sum()


def test_pointwise_bce_equals_the_formula_and_bears_extreme_scores():
    scores, loss_fn = leaf(), PointwiseLoss(kind="bce", label="safe")
    loss, metrics = loss_fn(output_of(score=scores), batch_of(safe=LABELS))
    (gradient,) = torch.autograd.grad(loss, scores)
    p = 1 / (1 + np.exp(-SCORES))
    assert loss.item() == pytest.approx(-(LABELS * np.log(p) + (1 - LABELS) * np.log(1 - p)).sum(), abs=1e-9)
    np.testing.assert_allclose(gradient.squeeze(-1).numpy(), p - LABELS, atol=1e-9)
    assert metrics["accuracy"].item() == ((SCORES > 0) == (LABELS > 0.5)).sum()
    extreme = torch.tensor([[1e4], [-1e4]] * 3)
    assert loss_fn(output_of(score=extreme), batch_of(safe=LABELS))[0].isfinite()


def test_multi_task_is_the_weighted_sum_with_pairs_as_the_unit():
    bradley, helpful = BradleyTerryLoss(), PointwiseLoss(kind="mse", label="helpful", head="helpful")
    batch = batch_of(helpful=LABELS, margin=MARGINS)
    output = output_of(score=leaf(), helpful=leaf() * 2)
    together = MultiTaskLoss(parts=((0.7, bradley), (0.2, helpful)))
    loss, metrics = together(output, batch)
    (pairs, pair_metrics), (points, point_metrics) = bradley(output, batch), helpful(output, batch)
    assert together.documents_per_unit == 2
    assert loss.item() == pytest.approx((0.7 * pairs + 0.2 * points / 2).item(), abs=1e-9)
    assert metrics["score/accuracy"] == pair_metrics["accuracy"]
    assert metrics["helpful/abs_error"] == pytest.approx(point_metrics["abs_error"].item() / 2)
    assert metrics["helpful/loss"].item() == pytest.approx(points.item() / 2)


def test_multi_task_over_labels_alone_counts_documents():
    parts = tuple((1.0, PointwiseLoss(kind="bce", label=name, head=name)) for name in ("safe", "honest"))
    output, batch = output_of(safe=leaf(), honest=leaf() / 2), batch_of(safe=LABELS, honest=1 - LABELS)
    loss, _ = MultiTaskLoss(parts=parts)(output, batch)
    assert loss.item() == pytest.approx(sum(part(output, batch)[0].item() for _, part in parts), abs=1e-9)
    with pytest.raises(AssertionError, match="different names"):
        MultiTaskLoss(parts=(parts[0], parts[0]))


def test_scores_of_an_odd_or_wide_shape_are_our_mistake():
    with pytest.raises(AssertionError, match="pairs"):
        BradleyTerryLoss()(output_of(score=torch.zeros(5, 1)), batch_of())
    with pytest.raises(AssertionError, match="S, 1"):
        BradleyTerryLoss()(output_of(score=torch.zeros(6, 2)), batch_of())
