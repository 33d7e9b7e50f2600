"""What a teacher writes down against its whole distributions in float64, and the losses made of either."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain.data.batch import collate
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.data.types import Batch, Unit
from posttrain.model.decoder import Decoder
from posttrain.model.forward import Teacher as Seen
from posttrain.model.forward import logits, loss_sum
from posttrain.model.load import load_decoder
from posttrain.model.losses.distill import DivergenceLoss, TopKDistillLoss
from posttrain.workflow.teacher import Teacher
from tiny_families import random_config, random_model

VOCAB = 61


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Decoder, Decoder]:
    """A student of 61 tokens, and a teacher whose matrix has seven rows more."""
    folder, found = tmp_path_factory.mktemp("models"), []
    for name, rows in (("student", VOCAB), ("teacher", VOCAB + 7)):
        config = random_config("qwen3", 1) | {"vocab_size": rows}
        found.append(load_decoder(random_model(config, folder / name, std=0.3)))
    with torch.no_grad():
        found[1].output_head.weight += 0.1 * torch.randn(found[1].output_head.weight.shape)
    return found[0], found[1]


def units() -> list[Unit]:
    rng = np.random.default_rng(0)
    masks = ([0, 0, 1, 1, 0, 1, 0.5], [0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1, 1])
    return [(shift(rng.integers(1, VOCAB, len(mask)).tolist(), list(map(float, mask))),) for mask in masks]


def teacher_of(model: Decoder, *, top_k: int, temperature: float = 1.0) -> Teacher:
    return Teacher(model=model, vocab_size=VOCAB, top_k=top_k, temperature=temperature, pack_tokens=12)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_trained_token_gets_the_teachers_likeliest_over_the_students_vocabulary(models, temperature: float):
    taught = teacher_of(models[1], top_k=5, temperature=temperature).teach(units())
    for (before,), (after,) in zip(units(), taught, strict=True):
        np.testing.assert_array_equal(after.input_ids, before.input_ids)
        batch = collate(pack([(before,)], pack_tokens=12)[0], pack_tokens=12)
        rows = logits(models[1], batch)[batch.loss_idx, :VOCAB].double() / temperature
        logprobs, ids = torch.log_softmax(rows, -1).topk(5, -1)
        assert after.teacher_ids is not None and after.teacher_logprobs is not None
        assert after.teacher_ids.tolist() == ids.tolist() and after.teacher_ids.max() < VOCAB
        np.testing.assert_allclose(after.teacher_logprobs, logprobs.numpy(), atol=1e-5)


def gradient(model: Decoder, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    assert model.embedding.weight.grad is not None
    return model.embedding.weight.grad.clone()


def seen(teacher: Decoder, batch: Batch) -> Seen:
    with torch.no_grad():
        return Seen(hidden=teacher(batch)[batch.loss_idx], weight=teacher.output_head.weight)  # pyright: ignore


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_as_many_as_there_are_tokens_give_the_loss_and_gradient_of_the_teacher_itself(models, kind):
    student, teacher = models
    options = {"kind": kind, "beta": 0.3, "temperature": 0.8}
    taught = teacher_of(teacher, top_k=VOCAB, temperature=0.8).teach(units())
    whole = collate(pack(units(), pack_tokens=24)[0], pack_tokens=24)
    known = collate(pack(taught, pack_tokens=24)[0], pack_tokens=24)
    assert known.teacher_ids is not None and known.teacher_ids.shape == (11, VOCAB)
    online, sums = loss_sum(student, whole, DivergenceLoss(**options), teacher=seen(teacher, whole))
    wanted = gradient(student, online)
    offline, found = loss_sum(student, known, TopKDistillLoss(**options))
    assert found["loss"].item() == pytest.approx(sums["loss"].item(), abs=1e-4) and sums["loss"] > 1
    torch.testing.assert_close(gradient(student, offline), wanted, atol=1e-4, rtol=1e-3)


def test_fewer_give_no_more_than_the_whole_divergence(models):
    student, teacher = models
    whole = collate(pack(units(), pack_tokens=24)[0], pack_tokens=24)
    full, _ = loss_sum(student, whole, DivergenceLoss(kind="forward_kl"), teacher=seen(teacher, whole))
    known = collate(pack(teacher_of(teacher, top_k=4).teach(units()), pack_tokens=24)[0], pack_tokens=24)
    part, metrics = loss_sum(student, known, TopKDistillLoss(kind="forward_kl"))
    assert 0 < part < full and 0 < metrics["teacher_mass"] < known.loss_mask.sum()


def test_units_stay_in_order_whatever_pack_they_were_read_in(models):
    many = [replace_ids(n) for n in range(30)]
    taught = teacher_of(models[1], top_k=2).teach(many)
    assert [each[0].input_ids[0] for each in taught] == [each[0].input_ids[0] for each in many]
    alone = [teacher_of(models[1], top_k=2).teach([each])[0] for each in many]
    for (one,), (other,) in zip(taught, alone, strict=True):
        np.testing.assert_allclose(one.teacher_logprobs, other.teacher_logprobs, atol=1e-5)  # pyright: ignore


def replace_ids(number: int) -> Unit:
    (sample,) = units()[number % 3]
    ids = sample.input_ids.copy()
    ids[0] = number
    return (replace(sample, input_ids=ids),)
