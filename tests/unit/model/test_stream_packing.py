"""What the stream packs trains as if every document stood alone: loss, gradients, and nothing seen of a neighbour."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from posttrain.data.batch import collate
from posttrain.data.encode import Encoder
from posttrain.data.mixture import Mixture, Part
from posttrain.data.row_reader import RowReader
from posttrain.data.source import Source
from posttrain.data.stream import PackStream, UnitSource
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.types import Pack
from posttrain.model.forward import forward, logits
from posttrain.model.load import load_decoder
from posttrain.model.losses.sft import SFTLoss
from tiny import tiny_model

T = 96


def conversation(rng):
    turns = []
    for _ in range(int(rng.integers(1, 3))):
        digits = "".join(map(str, rng.integers(0, 10, int(rng.integers(1, 9)))))
        turns += [{"role": "user", "content": f"sort {digits}"}, {"role": "assistant", "content": digits[::-1]}]
    return turns


@pytest.fixture(scope="module", params=["conversation", "preference"])
def packs(request, tmp_path_factory):
    """A model and the packs of one window of it: single documents, and pairs."""
    folder, rng = tmp_path_factory.mktemp("packs"), np.random.default_rng(0)
    tiny_model(folder)
    if request.param == "conversation":
        rows = [{"messages": conversation(rng)} for _ in range(40)]
    else:
        rows = [
            {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": [{"role": "assistant", "content": "no"}]}
            for turns in (conversation(rng) for _ in range(40))
        ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, read = Source(str(folder / "rows.jsonl"), key="data.sources[0]"), RowReader(wanted=request.param)
    encoder = Encoder(BaseHFModelTokenizer(folder), wanted=request.param, pack_tokens=T, over_long="drop")
    units = UnitSource(source, encoder, read=read, seed=0, number=0)
    mixture = Mixture([Part(name="rows", num_rows=40, weight=((0, 1.0),), max_draws=40)], seed=0)
    found = PackStream(mixture, [units], pack_tokens=T, seed=0).window(0).packs
    assert max(len(pack.samples) for pack in found) > 2
    return load_decoder(folder), found


def loss_and_gradients(model, packs, pack_tokens):
    """Loss sum in float64, and the gradients of all packs together."""
    model.zero_grad()
    total = 0.0
    for pack in packs:
        batch = collate(pack, pack_tokens=pack_tokens or pack.num_tokens)
        loss, _ = SFTLoss()(forward(model, batch, temperature=1.0), batch)
        loss.backward()
        total += loss.double().item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_packs_have_the_loss_and_gradients_of_their_documents_one_by_one(packs):
    model, found = packs
    alone = [Pack(samples=(sample,), num_units=1) for pack in found for sample in pack.samples]
    packed_loss, packed = loss_and_gradients(model, found, T)
    single_loss, single = loss_and_gradients(model, alone, None)
    assert packed_loss == pytest.approx(single_loss, rel=1e-6)
    for name, gradient in single.items():
        scale = gradient.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(packed[name], gradient, atol=1e-5 * float(scale), rtol=1e-4)


def test_a_changed_document_leaves_the_logits_of_its_neighbours_bitwise_alone(packs):
    model, found = packs
    pack = max(found, key=lambda each: len(each.samples))
    victim = len(pack.samples) // 2
    sample = pack.samples[victim]
    other = replace(sample, input_ids=(sample.input_ids + 1) % 200)
    changed = replace(pack, samples=(*pack.samples[:victim], other, *pack.samples[victim + 1 :]))
    before, after = (logits(model, collate(each, pack_tokens=T)) for each in (pack, changed))
    start = sum(map(len, pack.samples[:victim]))
    end = start + len(sample)
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end : pack.num_tokens], after[end : pack.num_tokens])
    assert not torch.equal(before[start:end], after[start:end])
