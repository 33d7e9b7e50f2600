"""vLLM multiplies with the adapters: they travel alone, its logprobs are the trainer's, and what it holds is proved."""

import threading
from pathlib import Path

import pytest
import torch

from posttrain.compute import weight_transfer
from posttrain.compute.generator.vllm import VllmGenerator, vllm_is_installed
from posttrain.compute.weight_sync import digest
from posttrain.compute.weight_transfer import Sender
from posttrain.errors import SyncError
from posttrain.model.backend import backend_of
from posttrain.model.load import load_decoder
from posttrain.model.lora import LoRA, adapters, add_lora
from posttrain.workflow.policy_model import sent_tensors
from vllm_models import asked, model_folder, our_logprobs, told_of_step

pytestmark = pytest.mark.skipif(not vllm_is_installed(), reason="vllm is not installed: make test-vllm")
BASE = backend_of("posttrain")
LORAS = {
    "all": LoRA(rank=6, alpha=9.0, targets=("all-linear",)),
    "some": LoRA(rank=6, alpha=9.0, targets=("q_proj", "mlp.up_proj", "down_proj")),
}
MODULES = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def engine(folder: Path) -> VllmGenerator:
    """One for all tests of this file; its buffers are for rank 8."""
    return VllmGenerator(model_uri=str(folder), stop_ids=(7, 9), pad_id=0, adapters=(6, MODULES))


def trained(folder: Path, *, which: str = "all", seed: int = 1):
    """The model of `folder` whose adapters have learned something."""
    model, noise = load_decoder(folder), torch.Generator().manual_seed(seed)
    add_lora(model, LORAS[which], seed=seed)
    with torch.no_grad():
        for _, _, adapter in adapters(model):
            adapter.b.copy_(0.1 * torch.randn(adapter.b.shape, generator=noise))
    return model


def sent(model, part="adapters") -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in sent_tensors(BASE, model, part)}


def check_logprobs(engine: VllmGenerator, model, version: int) -> None:
    requests = [asked(*range(10, 10 + n), seed=n, new=30) for n in (1, 3, 20)]
    for request, made in zip(requests, engine.generate(requests), strict=True):
        torch.testing.assert_close(
            torch.tensor(made.logprobs), our_logprobs(model, request, made), atol=2e-5, rtol=1e-5
        )
        assert made.versions == (version,) * len(made.token_ids)


def test_adapters_without_the_weights_beside_them_are_refused(engine: VllmGenerator, folder: Path):
    if engine.version >= 0:
        pytest.skip("another test came first")
    with pytest.raises(SyncError, match="adapters came without the weights"):
        engine.sync(0, sent(trained(folder)))


@pytest.mark.parametrize("which", ["all", "some"])
def test_two_versions_of_adapters_that_came_alone_are_sampled_from_as_the_trainer_scores_them(engine, folder, which):
    first, second = (trained(folder, which=which, seed=seed) for seed in (1, 2))
    whole = sent(first, "whole")
    assert engine.sync(3, whole) == digest(whole.items())
    check_logprobs(engine, first, 3)
    alone = sent(second)
    assert sum(t.numel() for t in alone.values()) < sum(t.numel() for t in whole.values()) / 4
    assert engine.sync(4, alone) == digest(alone.items())
    check_logprobs(engine, second, 4)


def test_adapters_that_are_not_taken_are_seen(engine: VllmGenerator, folder: Path, monkeypatch):
    engine.sync(3, sent(trained(folder), "whole"))
    later = sent(trained(folder, seed=2))
    monkeypatch.setattr(engine, "_load", lambda version, weights: None)
    assert engine.sync(4, later) != digest(later.items())


@pytest.mark.parametrize("matrix", ["lora_a_stacked", "lora_b_stacked"])
def test_one_number_of_an_adapter_that_is_lost_is_seen(engine: VllmGenerator, folder: Path, matrix: str):
    weights = sent(trained(folder))
    engine.sync(3, sent(trained(folder), "whole"))
    held = engine.engine.model_executor.driver_worker.get_model().get_submodule("model.layers.1.self_attn.qkv_proj")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for place in range(3):
        assert engine.sync(4, weights) == digest(weights.items())
        getattr(held, matrix)[place][0, 0, 3, 2] += 1e-6
        assert engine._on_engine(lambda: engine._held(shapes)) != digest(weights.items())


def test_what_lies_in_vllms_buffers_beside_what_was_sent_is_refused(engine: VllmGenerator, folder: Path):
    weights = sent(trained(folder, which="some"))
    engine.sync(3, sent(trained(folder, which="some"), "whole"))
    held = engine.engine.model_executor.driver_worker.get_model().get_submodule("model.layers.1.self_attn.qkv_proj")
    held.lora_b_stacked[2][0, 0, 0, 0] = 1.0  # v, which has no adapter
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    with pytest.raises(SyncError, match="vllm holds 1 elements of adapters that no tensor of the policy fills"):
        engine._on_engine(lambda: engine._held(shapes))


def test_adapters_come_in_buckets_between_two_tokens_and_every_later_token_is_of_the_new_ones(
    engine, folder: Path, monkeypatch
):
    monkeypatch.setattr(weight_transfer, "BUCKET_BYTES", 1 << 14)
    before, after = trained(folder), trained(folder, seed=2)
    sender = Sender(torch.device("cpu"), lambda part: sent_tensors(BASE, after, part), largest=1)
    address = sender.meet("127.0.0.1")
    joining = threading.Thread(target=lambda: sender.join(world_size=2, timeout_s=60))
    joining.start()
    engine.join(address, 1, 2, 60.0)
    joining.join()

    def sync() -> int:
        sender.start("float32", "adapters")
        engine.begin_sync(4)
        buckets = 0
        while packed := sender.fill():
            sending = threading.Thread(target=sender.send)
            sending.start()
            engine.load_bucket(packed)
            sending.join()
            buckets += 1
        assert engine.end_sync() == sender.digest("float32", "adapters")
        return buckets

    engine.sync(3, sent(before, "whole"))
    requests = [asked(*range(11, 11 + n), seed=n, new=900) for n in (2, 9, 40)]
    made: list = []
    waiting = threading.Thread(target=lambda: made.extend(engine.generate(requests)))
    with told_of_step(engine) as started:
        waiting.start()
        assert started.wait(60)
        assert sync() > 2
        waiting.join(120)
    switched = 0
    for request, completion in zip(requests, made, strict=True):
        logprobs, old = torch.tensor(completion.logprobs), completion.versions.count(3)
        assert completion.versions == (3,) * old + (4,) * (len(logprobs) - old)
        of_before, of_after = (our_logprobs(model, request, completion) for model in (before, after))
        torch.testing.assert_close(logprobs[:old], of_before[:old], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(logprobs[old:], of_after[old:], atol=2e-5, rtol=1e-5)
        switched += 0 < old < len(logprobs)
    assert switched, "no request ran through the sync"
