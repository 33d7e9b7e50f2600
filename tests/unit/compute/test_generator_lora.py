"""The embedded generator with adapters: they come alone, its logprobs are the trainer's, what it holds is proved."""

import pytest
import torch

from posttrain import storage
from posttrain.compute.generator import Completion, Request
from posttrain.compute.generator.transformers import TransformersGenerator
from posttrain.compute.weight_sync import digest
from posttrain.data.batch import collate
from posttrain.data.sample import shift
from posttrain.data.types import Pack
from posttrain.errors import SyncError
from posttrain.model.backend import backend_of
from posttrain.model.forward import forward
from posttrain.model.load import load_decoder
from posttrain.model.lora import LoRA, adapters, add_lora
from posttrain.workflow.policy_model import sent_tensors
from tiny_families import random_config, random_model

BACKEND = backend_of("posttrain")
FAMILIES = ("qwen3", "qwen2", "gemma3_text")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        random_model(random_config(family, 1) | {"vocab_size": 97}, root / f"{family}_made", std=0.2)
        storage.publish(root / f"{family}_made", str(root / family))
    return {family: str(root / family) for family in FAMILIES}


def trained(folder: str, *, seed: int = 1, targets: tuple[str, ...] = ("all-linear",)):
    """The model of `folder` whose adapters have learned something."""
    model, noise = load_decoder(folder), torch.Generator().manual_seed(seed)
    add_lora(model, LoRA(rank=3, alpha=7.0, targets=targets), seed=seed)
    with torch.no_grad():
        for _, _, adapter in adapters(model):
            adapter.b.copy_(0.3 * torch.randn(adapter.b.shape, generator=noise))
    return model


def sent(model, part="adapters") -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in sent_tensors(BACKEND, model, part)}


def generator(folder: str) -> TransformersGenerator:
    return TransformersGenerator(model_uri=folder, stop_ids=(2,), pad_id=0)


def logprobs(model, asked: Request, made: Completion) -> torch.Tensor:
    ids = [*asked.token_ids, *made.token_ids]
    one = shift(ids, [0.0] * len(asked.token_ids) + [1.0] * len(made.token_ids))
    batch = collate(Pack(samples=(one,), num_units=1), pack_tokens=len(ids))
    return forward(model, batch, temperature=asked.temperature).logprobs.detach()


def check_logprobs(engine: TransformersGenerator, model, version: int) -> None:
    asked = [
        Request(token_ids=tuple(range(10, 10 + n)), seed=n, temperature=0.8, max_new_tokens=12) for n in (1, 4, 20)
    ]
    for one, made in zip(asked, engine.generate(asked), strict=True):
        torch.testing.assert_close(torch.tensor(made.logprobs), logprobs(model, one, made), atol=1e-5, rtol=1e-4)
        assert made.versions == (version,) * len(made.token_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_versions_of_adapters_that_came_alone_are_sampled_from_as_the_trainer_scores_them(folders, family):
    first, second = (trained(folders[family], seed=seed) for seed in (1, 2))
    engine, whole, alone = generator(folders[family]), sent(first, "whole"), sent(second)
    assert engine.sync(3, whole) == digest(whole.items())
    check_logprobs(engine, first, 3)
    assert engine.sync(4, alone) == digest(alone.items())
    check_logprobs(engine, second, 4)


def test_what_is_sent_once_and_what_each_time_is_what_stands_still_and_what_is_trained(folders):
    model = trained(folders["qwen3"], targets=("q_proj", "down_proj"))
    whole, alone, merged = (sent(model, part) for part in ("whole", "adapters", "merged"))
    frozen = dict(BACKEND.tensors(load_decoder(folders["qwen3"])))
    assert list(whole) == [*frozen, *alone] and list(merged) == list(frozen)
    assert all(torch.equal(whole[name], frozen[name]) for name in frozen)
    assert sum(t.numel() for t in alone.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for name in (each for each in alone if ".lora_A." in each):
        weight = f"{name.removeprefix('base_model.model.').removesuffix('.lora_A.weight')}.weight"
        product = alone[name.replace("lora_A", "lora_B")] @ alone[name]
        torch.testing.assert_close(merged[weight] - frozen[weight], product, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_does_not_arrive_is_seen(folders):
    engine, first, later = generator(folders["qwen3"]), trained(folders["qwen3"]), trained(folders["qwen3"], seed=2)
    engine.sync(3, sent(first, "whole"))
    for lost in (next(iter(sent(later))), list(sent(later))[-1]):
        stale = sent(later) | {lost: sent(first)[lost]}
        assert engine.sync(4, stale) == digest(stale.items()) != digest(sent(later).items())


def test_adapters_without_the_weights_beside_them_are_refused(folders):
    with pytest.raises(SyncError, match="adapters came without the weights that they stand beside"):
        generator(folders["qwen3"]).sync(0, sent(trained(folders["qwen3"])))
