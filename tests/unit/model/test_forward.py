"""The losses of tokens against plain formulas, and the forward pass that hands them what they read."""

import numpy as np
import pytest
import torch
from torch import Tensor

from loss_batch import loss_batch
from posttrain.data.batch import collate
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.model.forward import Output, forward, loss_sum
from posttrain.model.load import load_decoder
from posttrain.model.losses.policy_gradient import TruncatedLoss
from posttrain.model.losses.sft import SFTLoss
from tiny import tiny_model


def test_sft_loss_is_the_weighted_negative_logprob():
    logprobs = torch.tensor([-1.0, -2.0, -4.0])
    loss, _ = SFTLoss()(Output(logprobs=logprobs, entropy=torch.zeros(3)), loss_batch(torch.tensor([1.0, 0.5, 2.0])))
    assert loss.item() == pytest.approx(1.0 * 1 + 0.5 * 2 + 2.0 * 4)


def test_truncated_loss_and_gradient_equal_the_formula():
    rng = np.random.default_rng(0)
    logprobs = torch.tensor(rng.normal(-1, 0.5, 12), requires_grad=True)
    sampler, ref = torch.tensor(rng.normal(-1, 0.5, 12)), torch.tensor(rng.normal(-1, 0.5, 12))
    advantages, mask = torch.tensor(rng.normal(size=12)), torch.tensor(rng.choice([0.5, 1.0], 12))
    loss_fn = TruncatedLoss(temperature=1.0, importance_cap=1.2, kl_coef=0.3)
    batch = loss_batch(mask, sampler_logprobs=sampler, advantages=advantages, ref_logprobs=ref)
    loss, metrics = loss_fn(Output(logprobs=logprobs, entropy=torch.ones(12)), batch)
    (gradient,) = torch.autograd.grad(loss, logprobs)

    lp = logprobs.detach().numpy()
    weight = np.minimum(np.exp(lp - sampler.numpy()), 1.2)
    gap = ref.numpy() - lp
    kl = np.exp(gap) - gap - 1
    expected = -(mask.numpy() * weight * advantages.numpy()).sum() + 0.3 * (mask.numpy() * kl).sum()
    expected_gradient = mask.numpy() * (-weight * advantages.numpy() + 0.3 * (1 - np.exp(gap)))
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    np.testing.assert_allclose(gradient.numpy(), expected_gradient, atol=1e-9)
    assert metrics["kl"].item() == pytest.approx((mask.numpy() * kl).sum(), abs=1e-9)
    assert metrics["importance_clipped"].item() == pytest.approx(
        (mask.numpy() * (np.exp(lp - sampler.numpy()) > 1.2)).sum()
    )


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_packing_and_accumulation_do_not_change_the_gradient(tmp_path, kind: str):
    folder = tiny_model(tmp_path)
    rng = np.random.default_rng(3)
    units = []
    for _ in range(24):
        prompt, trained = int(rng.integers(2, 6)), int(rng.integers(2, 9))
        ids = rng.integers(0, 200, prompt + trained).tolist()
        columns = {}
        if kind == "grpo":
            columns = {
                "sampler_logprobs": [0.0] * prompt + rng.normal(-5.3, 0.1, trained).tolist(),
                "advantages": [0.0] * prompt + [float(rng.normal())] * trained,
            }
        units.append((shift(ids, [0.0] * prompt + [1.0] * trained, **columns),))
    loss_fn = SFTLoss() if kind == "sft" else TruncatedLoss(temperature=1.0)

    def gradient(pack_tokens: int, alone: bool) -> Tensor:
        model = load_decoder(folder)
        packs = (
            [p for u in units for p in pack([u], pack_tokens=pack_tokens)]
            if alone
            else pack(units, pack_tokens=pack_tokens)
        )
        denominator = sum(p.loss_tokens for p in packs)
        for p in packs:
            batch = collate(p, pack_tokens=pack_tokens)
            if alone:
                loss = loss_fn(forward(model, batch), batch)[0] / denominator
            else:
                loss, _ = loss_sum(model, batch, loss_fn, scale=1 / denominator)
            loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    one_by_one = gradient(16, alone=True)
    for pack_tokens in (64, 256):
        torch.testing.assert_close(gradient(pack_tokens, alone=False), one_by_one, atol=2e-6, rtol=1e-4)


def test_the_loss_made_in_the_forward_has_the_value_and_metrics_of_the_loss_of_an_output(tmp_path, monkeypatch):
    monkeypatch.setattr("posttrain.model.head.CHUNK_ROWS", 16)
    model = load_decoder(tiny_model(tmp_path))
    samples = [(shift(np.random.default_rng(n).integers(0, 200, 20).tolist(), [1.0] * 20),) for n in range(3)]
    (only,) = pack(samples, pack_tokens=64)
    batch = collate(only, pack_tokens=64)
    expected, metrics = SFTLoss()(forward(model, batch), batch)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got, found = loss_sum(model, batch, SFTLoss())
        assert got.item() == pytest.approx(expected.item(), rel=1e-6) and got.requires_grad == grad
        assert found.pop("loss").item() == pytest.approx(expected.item(), rel=1e-6)
        assert {k: v.item() for k, v in found.items()} == pytest.approx({k: v.item() for k, v in metrics.items()})
