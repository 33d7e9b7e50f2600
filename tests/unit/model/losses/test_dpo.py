"""DPOLoss against plain float64 sums, pair by pair, on real packs."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain.data.batch import collate
from posttrain.data.sample import shift
from posttrain.data.types import Batch, Pack, Sample
from posttrain.model.losses.dpo import DPOLoss
from posttrain.model.output import Output

LENGTHS = [(2, 3), (3, 5), (4, 1), (1, 6), (2, 2), (5, 4)]
"""Prompt and completion tokens of three pairs, chosen first."""


def documents(weighted: bool = False) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for prompt, completion in LENGTHS:
        mask = rng.choice([0.5, 1.0, 2.0], completion) if weighted else np.ones(completion)
        samples.append(shift(rng.integers(0, 9, prompt + completion), [*[0.0] * prompt, *mask]))
    return samples


def batch_of(samples: list[Sample], pack_tokens: int = 64) -> Batch:
    return collate(Pack(samples=tuple(samples), num_units=len(samples) // 2), pack_tokens=pack_tokens)


def rows(count: int, seed: int) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(-1.5, 0.7, count), dtype=torch.float64)


def output_of(logprobs: Tensor) -> Output:
    return Output(logprobs=logprobs, entropy=torch.zeros(len(logprobs)))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


FORMULAS = {
    "sigmoid": (DPOLoss(beta=0.3), lambda w, r: softplus(-0.3 * (w - r))),
    "smoothed": (
        DPOLoss(beta=0.3, label_smoothing=0.1),
        lambda w, r: 0.9 * softplus(-0.3 * (w - r)) + 0.1 * softplus(0.3 * (w - r)),
    ),
    "hinge": (DPOLoss(beta=0.3, kind="hinge"), lambda w, r: max(0.0, 1 - 0.3 * (w - r))),
    "ipo": (DPOLoss(beta=0.3, kind="ipo"), lambda w, r: (w - r - 1 / 0.6) ** 2),
    "ipo by token": (DPOLoss(beta=0.3, kind="ipo", length_normalised=True), lambda w, r: (w - r - 1 / 0.6) ** 2),
    "simpo": (
        DPOLoss(beta=2.0, gamma=0.7, length_normalised=True, reference_free=True),
        lambda w, r: softplus(0.7 - 2.0 * (w - r)),
    ),
    "sft": (DPOLoss(beta=0.3, sft_coef=0.4), lambda w, r: softplus(-0.3 * (w - r))),
}
"""Name -> the loss and f(chosen score, rejected score) of its paper."""


def by_hand(loss: DPOLoss, formula, logprobs: list[float], reference: list[float], weights: list[float]) -> dict:
    """Pair after pair, token after token, in Python floats."""
    sums = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0, "chosen_logprob": 0.0, "rejected_logprob": 0.0}
    at = 0
    for pair in range(len(LENGTHS) // 2):
        scores, policy, lengths = [], [], []
        for _, count in LENGTHS[2 * pair : 2 * pair + 2]:
            ref = [0.0] * count if loss.reference_free else reference[at : at + count]
            w, lp = weights[at : at + count], logprobs[at : at + count]
            lengths.append(sum(w))
            policy.append(sum(a * b for a, b in zip(w, lp, strict=True)))
            score = sum(a * (b - c) for a, b, c in zip(w, lp, ref, strict=True))
            scores.append(score / lengths[-1] if loss.length_normalised else score)
            at += count
        sums["loss"] += formula(*scores) - loss.sft_coef * policy[0] / lengths[0]
        sums["accuracy"] += scores[0] > scores[1]
        sums["margin"] += loss.beta * (scores[0] - scores[1])
        sums["chosen_logprob"] += policy[0]
        sums["rejected_logprob"] += policy[1]
    return sums


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_loss_metrics_and_gradient_equal_the_formula(name: str, weighted: bool):
    loss_fn, formula = FORMULAS[name]
    batch = batch_of(documents(weighted))
    logprobs, reference = rows(len(batch.loss_idx), 1), rows(len(batch.loss_idx), 2)
    weights = batch.loss_mask.tolist()

    def expected(values: Tensor) -> dict:
        return by_hand(loss_fn, formula, values.tolist(), reference.tolist(), weights)

    leaf = logprobs.clone().requires_grad_()
    loss, metrics = loss_fn(output_of(leaf), replace(batch, ref_logprobs=reference))
    (gradient,) = torch.autograd.grad(loss, leaf)
    for key, value in expected(logprobs).items():
        assert {"loss": loss, **metrics}[key].item() == pytest.approx(value, abs=1e-9), key
    assert metrics["chosen_reward"] - metrics["rejected_reward"] == pytest.approx(metrics["margin"].item())
    assert not any(value.requires_grad for value in metrics.values())
    step = 1e-6 * torch.eye(len(logprobs), dtype=torch.float64)
    slopes = [(expected(logprobs + e)["loss"] - expected(logprobs - e)["loss"]) / 2e-6 for e in step]
    np.testing.assert_allclose(gradient.numpy(), slopes, atol=1e-7)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_reference_by_document_equals_one_by_token(weighted: bool):
    batch = batch_of(documents(weighted))
    logprobs, reference = rows(len(batch.loss_idx), 1), rows(len(batch.loss_idx), 2)
    parts = (batch.loss_mask * reference).split([count for _, count in LENGTHS])
    sums = torch.stack([part.sum() for part in parts])
    by_token, _ = DPOLoss(beta=0.3)(output_of(logprobs), replace(batch, ref_logprobs=reference))
    by_document, _ = DPOLoss(beta=0.3)(output_of(logprobs), replace(batch, fields={"ref_logprob": sums}))
    assert by_document.item() == pytest.approx(by_token.item(), abs=1e-9)


@pytest.mark.parametrize("pack_tokens", [32, 33, 38, 64, 65])
@pytest.mark.parametrize("name", FORMULAS)
def test_padding_adds_no_pair(name: str, pack_tokens: int):
    loss_fn, samples = FORMULAS[name][0], documents()
    tight = batch_of(samples, sum(len(sample) for sample in samples))
    padded = batch_of(samples, pack_tokens)
    logprobs, reference = rows(len(tight.loss_idx), 1), rows(len(tight.loss_idx), 2)
    expected = loss_fn(output_of(logprobs), replace(tight, ref_logprobs=reference))
    got = loss_fn(output_of(logprobs), replace(padded, ref_logprobs=reference))
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


def test_packing_pairs_together_sums_their_losses():
    samples = documents()
    logprobs = rows(sum(count for _, count in LENGTHS), 1)
    loss_fn = DPOLoss(beta=0.3, sft_coef=0.2, reference_free=True)
    together, _ = loss_fn(output_of(logprobs), batch_of(samples))
    chunks = logprobs.split([sum(count for _, count in LENGTHS[i : i + 2]) for i in (0, 2, 4)])
    alone = [loss_fn(output_of(c), batch_of(samples[2 * i : 2 * i + 2]))[0] for i, c in enumerate(chunks)]
    assert together.item() == pytest.approx(sum(part.item() for part in alone), abs=1e-9)


def test_a_forgotten_reference_is_our_mistake():
    batch = batch_of(documents())
    with pytest.raises(AssertionError, match="reference_free"):
        DPOLoss(beta=0.3)(output_of(rows(len(batch.loss_idx), 1)), batch)
    with pytest.raises(AssertionError, match="pairs"):
        DPOLoss(beta=0.3, reference_free=True)(output_of(rows(9, 1)), batch_of(documents()[:3]))
    with pytest.raises(AssertionError, match="smoothing"):
        DPOLoss(beta=0.3, kind="hinge", label_smoothing=0.1)


def test_extreme_margins_stay_finite():
    batch = batch_of(documents())
    for value in (-1e4, 0.0):
        leaf = torch.where(batch.doc_id[batch.loss_idx] % 2 == 0, value, -5e3).requires_grad_()
        loss, _ = DPOLoss(beta=1.0, label_smoothing=0.1, reference_free=True)(output_of(leaf), batch)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.isfinite() and gradient.isfinite().all()
