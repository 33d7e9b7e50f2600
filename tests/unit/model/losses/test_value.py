"""The critic's loss against the formula in float64, and its gradient through the model beside the policy's."""

import numpy as np
import pytest
import torch
from torch import Tensor

from loss_batch import loss_batch
from posttrain.data.batch import collate
from posttrain.data.sample import shift
from posttrain.data.types import Pack
from posttrain.model.decoder import Decoder
from posttrain.model.forward import forward, loss_sum
from posttrain.model.heads import VALUE
from posttrain.model.load import load_decoder
from posttrain.model.losses.policy_gradient import ClippedLoss, SequenceLoss
from posttrain.model.losses.value import ValueLoss
from tiny_families import random_config, random_model

POLICY = ClippedLoss(temperature=1.0, kl_coef=0.0)


def expected(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for v, before, r, m in zip(values, old, returns, mask, strict=True):
        near = torch.minimum(torch.maximum(v, before - clip), before + clip)
        total = total + m * torch.maximum((v - r) ** 2, (near - r) ** 2) / 2
    return total


def test_the_value_loss_and_its_gradient_equal_the_formula():
    generator = torch.manual_seed(0)
    values, old, returns = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    mask = torch.rand(40, generator=generator, dtype=torch.float64)
    leaf, reference = values.clone().requires_grad_(), values.clone().requires_grad_()
    loss, metrics = ValueLoss(policy=POLICY, coef=0.3, clip=0.5).of_values(
        leaf, loss_batch(mask, values=old, returns=returns)
    )
    wanted = expected(reference, old, returns, mask, 0.5)
    torch.testing.assert_close(loss, 0.3 * wanted)
    torch.testing.assert_close(metrics["value/loss"], wanted.detach())
    torch.testing.assert_close(torch.autograd.grad(loss, leaf), torch.autograd.grad(0.3 * wanted, reference))
    assert 0 < metrics["value/clipped"] < mask.sum(), "the case must reach the bound, and not always"


def model_and_batch(tmp_path):
    folder = random_model(random_config("qwen3", 1) | {"vocab_size": 97}, tmp_path / "base")
    model = load_decoder(folder, heads={VALUE: 1})
    rng = np.random.default_rng(0)

    def column(values: list[float]) -> list[float]:
        return [0.0, 0.0, 0.0, *values]

    samples = []
    for n in (5, 3):
        numbers = {name: column(rng.normal(size=n).tolist()) for name in ("sampler_logprobs", "advantages")}
        numbers |= {name: column(rng.normal(size=n).tolist()) for name in ("values", "returns")}
        samples.append(shift(rng.integers(1, 97, 3 + n).tolist(), column([1.0] * n), **numbers))
    return model, collate(Pack(samples=tuple(samples), num_units=2), pack_tokens=20)


def gradients(model: Decoder, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_new_critic_expects_nothing_and_one_value_stands_before_every_trained_token(tmp_path):
    model, batch = model_and_batch(tmp_path)
    output = forward(model, batch)
    assert output.values is not None and output.values.tolist() == [0.0] * 8 and output.scores == {}
    head = model.heads[VALUE]
    torch.nn.init.normal_(head.weight)
    found = forward(model, batch, with_logprobs=False).values
    with torch.no_grad():
        hidden = model(batch)
        one_by_one = torch.stack([(hidden[i] * head.weight[0]).sum() for i in batch.loss_idx.tolist()])
    torch.testing.assert_close(found, one_by_one)


def test_one_backward_trains_the_policy_and_its_critic_together(tmp_path):
    model, batch = model_and_batch(tmp_path)
    torch.nn.init.normal_(model.heads[VALUE].weight)
    loss_fn = ValueLoss(policy=POLICY, coef=0.3, clip=0.1)
    in_chunks, sums = loss_sum(model, batch, loss_fn, scale=0.25)
    found = gradients(model, in_chunks)
    whole, metrics = loss_fn(forward(model, batch), batch)  # the same loss of all rows at once, by autograd
    wanted = gradients(model, 0.25 * whole)
    torch.testing.assert_close(in_chunks, 0.25 * whole)
    assert sums["loss"].item() == pytest.approx(whole.item(), rel=1e-5)
    assert sums.keys() == {"loss", *metrics}
    assert found.keys() == wanted.keys() and f"heads.{VALUE}.weight" in found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4)


def test_advantages_of_tokens_refuse_a_ratio_of_completions():
    with pytest.raises(AssertionError, match="beside a loss of tokens"):
        ValueLoss(policy=SequenceLoss(temperature=1.0))
