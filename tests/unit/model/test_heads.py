"""Score heads: read at each sample's last token, trained, stored beside the model, opened by transformers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from posttrain.data.batch import collate
from posttrain.data.sample import shift
from posttrain.data.types import Pack
from posttrain.errors import ModelError
from posttrain.model.export import export_model
from posttrain.model.forward import forward, loss_sum
from posttrain.model.load import load_decoder
from posttrain.model.losses.reward import BradleyTerryLoss
from posttrain.model.losses.sft import SFTLoss
from posttrain.model.verify import compare_with_transformers
from tiny_families import FAMILIES, random_config, random_model


class TwoLayers(torch.nn.Sequential):
    """A user's own head."""

    def __init__(self, hidden_size: int):
        super().__init__(torch.nn.Linear(hidden_size, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def batch_of(lengths=(5, 9, 3, 7), vocab=60):
    rng = np.random.default_rng(0)
    samples = tuple(shift(rng.integers(1, vocab, n + 1).tolist(), [1.0] * (n + 1)) for n in lengths)
    return collate(Pack(samples=samples, num_units=len(samples)), pack_tokens=sum(lengths) + 6)


def folder_of(tmp_path, family="qwen3", **changes):
    return random_model(random_config(family, 1) | {"vocab_size": 97} | changes, tmp_path / "base")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reward_model_opens_in_transformers_and_gives_our_scores(tmp_path, family):
    from transformers import AutoModelForSequenceClassification

    folder = folder_of(tmp_path, family)
    model = load_decoder(folder, heads={"score": 3}, lm_head=False, seed=5)
    export_model(model, tmp_path / "out", like=folder)
    batch = batch_of()
    ours = forward(model, batch).scores["score"]
    again = load_decoder(tmp_path / "out")
    assert again.config == model.config and torch.equal(forward(again, batch).scores["score"], ours)
    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", **settings).eval()
    ends = batch.cu_seqlens.tolist()
    for number in range(batch.num_samples):
        ids = batch.input_ids[None, ends[number] : ends[number + 1]]
        torch.testing.assert_close(theirs(ids).logits[0], ours[number], atol=1e-4, rtol=1e-4)


def test_several_heads_stand_beside_an_lm_head_that_transformers_still_opens(tmp_path):
    folder = folder_of(tmp_path)
    heads = {"click": 1, "watch_time": 2, "own": f"{__name__}:TwoLayers"}
    model = load_decoder(folder, heads=heads, seed=1)
    export_model(model, tmp_path / "out", like=folder)
    assert compare_with_transformers(tmp_path / "out")["max_abs_diff"] <= 1e-4
    again = load_decoder(tmp_path / "out", seed=2)
    batch = batch_of()
    before, after = forward(model, batch), forward(again, batch)
    assert {name: tuple(found.shape) for name, found in after.scores.items()} == {
        "click": (4, 1),
        "watch_time": (4, 2),
        "own": (4, 2),
    }
    for name, scores in before.scores.items():
        assert torch.equal(scores, after.scores[name]), name
    assert torch.equal(before.logprobs, after.logprobs)


def test_new_heads_are_drawn_from_the_seed(tmp_path):
    folder = folder_of(tmp_path)
    heads = {"score": 1, "own": f"{__name__}:TwoLayers"}
    first, same, other = (load_decoder(folder, heads=heads, seed=n) for n in (0, 0, 1))
    for name in heads:
        for a, b, c in zip(*(model.heads[name].parameters() for model in (first, same, other)), strict=True):
            assert torch.equal(a, b) and not torch.equal(a, c)
    width = first.config.hidden_size
    assert float(load_decoder(folder, heads={"score": 500}).heads["score"].weight.detach().std()) == pytest.approx(
        (width + 1) ** -0.5, rel=0.05
    )


def test_a_reward_loss_trains_head_and_trunk_without_the_lm_head(tmp_path):
    model = load_decoder(folder_of(tmp_path, tie_word_embeddings=False), heads={"score": 1})
    loss, sums = loss_sum(model, batch_of(), BradleyTerryLoss(), scale=0.5)
    loss.backward()
    scores = forward(model, batch_of()).scores["score"][:, 0].double()
    expected = -torch.nn.functional.logsigmoid(scores[0::2] - scores[1::2]).sum()
    assert loss.item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    assert sums["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert model.heads["score"].weight.grad.any() and model.layers[0].attention.q_proj.weight.grad.any()
    assert model.output_head.weight.grad is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lm_head": False}, "needs a linear head 'score'"),
        ({"lm_head": False, "heads": {"other": 1}}, "needs a linear head 'score'"),
        ({"heads": {"own": "builtins:str"}}, "must return a torch.nn.Module"),
    ],
)
def test_heads_that_cannot_be_are_refused(tmp_path, settings, message):
    with pytest.raises((ModelError, TypeError), match=message):
        load_decoder(folder_of(tmp_path), **settings)


def test_a_stored_head_of_another_shape_is_refused(tmp_path):
    folder = folder_of(tmp_path)
    export_model(load_decoder(folder, heads={"click": 1}), tmp_path / "out", like=folder)
    with pytest.raises(ModelError, match=r"head click holds .*\(1, \d+\).* expects .*\(2, \d+\)"):
        load_decoder(tmp_path / "out", heads={"click": 2})


class Side(torch.nn.Module):
    """A user's own module at the front: a number, and one of three categories."""

    features = ("gap", "device")

    def __init__(self, hidden_size: int):
        super().__init__()
        self.gap, self.device = torch.nn.Linear(1, hidden_size), torch.nn.Embedding(3, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        known = ~features.isnan()
        gap, device = features.nan_to_num().unbind(1)
        return self.gap(gap[:, None]) * known[:, :1] + self.device(device.long()) * known[:, 1:]


def test_a_module_at_the_front_adds_what_it_makes_of_features_and_learns(tmp_path):
    folder = folder_of(tmp_path)
    model = load_decoder(folder, heads={"side": f"{__name__}:Side"}, seed=1)
    batch, plain = batch_of(), load_decoder(folder)
    none = torch.full((len(batch.input_ids), 2), torch.nan)
    some = none.clone()
    some[:5] = torch.tensor([0.5, 2.0])  # the first sample's tokens
    ours, without, absent = (model(b) for b in (replace(batch, features=some), batch, replace(batch, features=none)))
    assert torch.equal(without, plain(batch)) and torch.equal(absent, without)
    assert (ours[:5] - without[:5]).abs().max() > 1e-3 and torch.equal(ours[5:], without[5:])
    loss_sum(model, replace(batch, features=some), SFTLoss())[0].backward()
    grads = {name: p.grad for name, p in model.heads["side"].named_parameters()}
    assert grads["gap.weight"].abs().sum() > 0
    assert grads["device.weight"].abs().sum(1).gt(0).tolist() == [False, False, True]


def test_an_export_keeps_the_module_at_the_front_and_opens_in_transformers_without(tmp_path):
    folder = folder_of(tmp_path)
    model = load_decoder(folder, heads={"side": f"{__name__}:Side", "click": 1}, seed=1)
    export_model(model, tmp_path / "out", like=folder)
    assert compare_with_transformers(tmp_path / "out")["max_abs_diff"] <= 1e-4
    batch = batch_of()
    batch = replace(batch, features=torch.ones(len(batch.input_ids), 2))
    assert torch.equal(load_decoder(tmp_path / "out")(batch), model(batch))
