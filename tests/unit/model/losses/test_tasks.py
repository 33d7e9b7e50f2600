"""Next tokens and heads of answers in one loss, against formulas in float64, through a whole model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from posttrain.data.batch import collate
from posttrain.data.sample import shift
from posttrain.data.types import Pack
from posttrain.model.forward import forward, loss_sum
from posttrain.model.load import load_decoder
from posttrain.model.losses.reward import MultiTaskLoss, PointwiseLoss
from posttrain.model.losses.sft import SFTLoss
from posttrain.model.losses.tasks import TaskLoss
from tiny_families import random_config, random_model

CLICK, HOURS = PointwiseLoss(kind="bce", label="click", head="click"), PointwiseLoss("mse", "hours", "hours")
LOSS = TaskLoss(policy=SFTLoss(), tasks=MultiTaskLoss(parts=((0.5, CLICK), (0.25, HOURS))))
NONE = float("nan")


def batch_of(labels=((4, 1.0, 0.5), (9, 0.0, NONE))):
    """Two samples, whose labels are (place in the first, click, hours); the second has none."""
    rng = np.random.default_rng(0)
    samples = []
    for length in (12, 7):
        sample = shift(
            rng.integers(1, 60, length + 1).tolist(), [0.0] + [1.0, 0.0, 2.0] * (length // 3) + [1.0] * (length % 3)
        )
        samples.append(replace(sample, labels=np.full((length, 2), np.nan, np.float32)))
    for place, *values in labels:
        samples[0].labels[place] = values
    return collate(Pack(samples=tuple(samples), num_units=2), pack_tokens=24)


@pytest.fixture
def model(tmp_path):
    folder = random_model(random_config("qwen3", 1) | {"vocab_size": 97}, tmp_path / "base")
    return load_decoder(folder, heads={"click": 1, "hours": 1}, seed=3)


def test_the_sum_is_the_tokens_loss_and_each_heads_where_an_answer_ends(model):
    batch = batch_of()
    assert batch.label_idx.tolist() == [4, 9]
    loss, sums = loss_sum(model, batch, LOSS, scale=0.5)
    tokens, token_sums = loss_sum(model, batch, SFTLoss(), scale=0.5)
    hidden = model(batch).detach()[[4, 9]].double()
    click, hours = (hidden @ model.heads[name].weight.detach().double().T for name in ("click", "hours"))
    bce = torch.nn.functional.softplus(-click[0, 0]) + torch.nn.functional.softplus(click[1, 0])
    mse = (hours[0, 0] - 0.5) ** 2
    expected = tokens.double() + 0.5 * (0.5 * bce + 0.25 * mse)
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sums["loss"].double(), 2 * expected.detach(), atol=1e-6, rtol=1e-5)
    assert sums["click/labelled"] == 2 and sums["hours/labelled"] == 1
    assert sums["click/accuracy"] == int(click[0, 0] > 0) + int(click[1, 0] <= 0)
    torch.testing.assert_close(sums["hours/abs_error"].double(), mse.sqrt(), atol=1e-6, rtol=1e-5)
    assert sums["entropy"] == token_sums["entropy"]


def test_heads_and_trunk_learn_from_labels_on_untrained_tokens(model):
    batch = batch_of(labels=((4, 1.0, NONE),))
    assert 4 not in batch.loss_idx
    loss_sum(model, batch, LOSS)[0].backward()
    both = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert both["heads.click.weight"].abs().sum() > 0 and both["heads.hours.weight"].abs().sum() == 0
    model.zero_grad()
    loss_sum(model, batch, SFTLoss())[0].backward()
    alone = model.layers[0].mlp.up_proj.weight.grad
    assert (both["layers.0.mlp.up_proj.weight"] - alone).abs().max() > 1e-6


def test_a_batch_without_a_label_is_the_tokens_loss_alone(model):
    batch = batch_of(labels=())
    loss, sums = loss_sum(model, batch, LOSS)
    loss.backward()
    assert torch.equal(sums["loss"], loss_sum(model, batch, SFTLoss())[1]["loss"]) and sums["click/labelled"] == 0
    assert model.heads["click"].weight.grad.abs().sum() == 0


def test_the_loss_of_outputs_is_that_of_the_model(model):
    batch = batch_of()
    with torch.no_grad():
        rows = model(batch)[batch.label_idx]
        scores = {name: model.heads[name](rows) for name in ("click", "hours")}
        loss, _ = LOSS(replace(forward(model, batch), scores=scores), batch)
        torch.testing.assert_close(loss, loss_sum(model, batch, LOSS)[0])
