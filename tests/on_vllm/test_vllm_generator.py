"""vLLM as our generator: its logprobs are the trainer's, its versions are told, and what it holds is proved."""

import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from posttrain.compute import weight_transfer
from posttrain.compute.generator.vllm import VllmGenerator, vllm_is_installed
from posttrain.compute.weight_sync import digest
from posttrain.compute.weight_transfer import Sender
from posttrain.errors import ComputeError, ConfigError, DataError, SyncError
from posttrain.model.load import load_decoder
from posttrain.model.weights import hf_tensors
from vllm_models import asked, model_folder, our_logprobs, told_of_step

pytestmark = pytest.mark.skipif(not vllm_is_installed(), reason="vllm is not installed: make test-vllm")
STOPS = (7, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def engine(folder: Path) -> VllmGenerator:
    """One engine for all tests of this file: a second in a process costs seconds."""
    return VllmGenerator(model_uri=str(folder), stop_ids=STOPS, pad_id=0)


@pytest.fixture
def synced(engine: VllmGenerator, folder: Path) -> VllmGenerator:
    engine.sync(3, dict(hf_tensors(load_decoder(folder))))
    return engine


def changed(folder: Path, *, by: float = 0.05, seed: int = 1):
    """The model of `folder` after a step of training, as it were."""
    model, noise = load_decoder(folder), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=noise))
    return model


def test_generating_before_a_sync_is_our_own_mistake(engine: VllmGenerator):
    if engine.version >= 0:
        pytest.skip("another test came first")
    with pytest.raises(AssertionError, match="holds no weights"):
        engine.generate([asked(1)])


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_sampler_logprobs_are_the_trainers(synced: VllmGenerator, folder: Path, temperature: float):
    requests = [asked(*range(10, 10 + n), seed=n, temperature=temperature, new=40) for n in (1, 3, 20)]
    model = load_decoder(folder)
    for request, made in zip(requests, synced.generate(requests), strict=True):
        expected = our_logprobs(model, request, made)
        torch.testing.assert_close(torch.tensor(made.logprobs), expected, atol=1e-5, rtol=1e-5)
        assert made.versions == (3,) * len(made.token_ids)


def test_seed_decides_and_greedy_ignores_it(synced: VllmGenerator):
    alone = synced.generate([asked(4, 5, seed=1)])[0]
    first, again, other = synced.generate([asked(4, 5, seed=s) for s in (1, 1, 2**64 - 1)])
    assert alone.token_ids == first.token_ids == again.token_ids != other.token_ids
    greedy = synced.generate([asked(4, 5, seed=s, temperature=0.0) for s in (1, 2)])
    assert greedy[0].token_ids == greedy[1].token_ids


def test_stop_tokens_end_and_are_kept_and_length_is_said(synced: VllmGenerator):
    made = synced.generate([asked(4, 5, seed=s, new=60) for s in range(64)])
    stopped = [c for c in made if c.finish_reason == "stop"]
    cut = [c for c in made if c.finish_reason == "length"]
    assert stopped and cut
    assert {c.token_ids[-1] for c in stopped} == set(STOPS)
    assert all(not set(STOPS) & set(c.token_ids[:-1]) for c in stopped)
    assert all(len(c.token_ids) == 60 and not set(STOPS) & set(c.token_ids) for c in cut)
    assert all(len(c.token_ids) == len(c.logprobs) == len(c.versions) for c in made)


def test_room_in_the_cache_is_looked_for_once_a_block_and_the_tokens_are_the_same(synced: VllmGenerator, monkeypatch):
    manager = synced.engine.engine_core.engine_core.scheduler.kv_cache_manager
    count, searches = manager.coordinator.get_num_blocks_to_allocate, []
    monkeypatch.setattr(
        manager.coordinator, "get_num_blocks_to_allocate", lambda **named: searches.append(1) or count(**named)
    )
    requests = [asked(*range(30, 30 + n), seed=n, new=300) for n in (1, 15, 16, 17, 200)]
    made = synced.generate(requests)
    tokens, seldom = sum(len(each.token_ids) for each in made), len(searches)
    monkeypatch.setattr(manager, "allocate_slots", partial(type(manager).allocate_slots, manager))  # vLLM's own
    assert synced.generate(requests) == made
    assert len(searches) - seldom >= tokens
    assert seldom < tokens / 8


def test_threads_that_ask_at_once_get_their_own_answers(synced: VllmGenerator):
    requests = [[asked(20 + n, seed=n), asked(40 + n, seed=n)] for n in range(8)]
    expected = [synced.generate(each) for each in requests]
    found: list = [None] * 8

    def ask(n: int) -> None:
        found[n] = synced.generate(requests[n])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[c.token_ids for c in each] for each in found] == [[c.token_ids for c in each] for each in expected]


def test_a_sync_answers_with_what_is_held_under_the_names_of_the_checkpoint(synced: VllmGenerator, folder: Path):
    weights = dict(hf_tensors(changed(folder)))
    assert any("q_proj" in name for name in weights), "vllm fuses these"
    assert synced.sync(4, weights) == digest(weights.items())
    request = asked(5, 6, new=20)
    (made,) = synced.generate([request])
    expected = our_logprobs(changed(folder), request, made)
    torch.testing.assert_close(torch.tensor(made.logprobs), expected, atol=1e-5, rtol=1e-5)


def test_a_sync_that_loses_one_number_is_seen(synced: VllmGenerator, folder: Path):
    weights = dict(hf_tensors(load_decoder(folder)))
    held = synced.engine.model_executor.driver_worker.get_model()
    sent = digest(weights.items())
    for name in ("model.layers.1.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"):
        assert synced.sync(5, weights) == sent
        with torch.no_grad():
            held.get_parameter(name)[100, 3] += 1e-6
        assert synced._on_engine(lambda: synced._held({n: tuple(t.shape) for n, t in weights.items()})) != sent


def test_weights_that_leave_a_parameter_unfilled_are_refused(synced: VllmGenerator, folder: Path):
    weights = dict(hf_tensors(load_decoder(folder)))
    del weights["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(SyncError, match=r"8192 elements of model\.layers\.1\.self_attn\.qkv_proj\.weight"):
        synced.sync(5, weights)


def test_a_sync_between_two_tokens_keeps_requests_and_every_later_token_is_of_the_new_weights(
    synced: VllmGenerator, folder: Path
):
    requests = [asked(*range(11, 11 + n), seed=n, new=900) for n in (2, 5, 9, 40)]
    made: list = []
    waiting = threading.Thread(target=lambda: made.extend(synced.generate(requests)))
    with told_of_step(synced) as started:
        waiting.start()
        assert started.wait(60)
        after = changed(folder)
        assert synced.sync(4, dict(hf_tensors(after))) == digest(hf_tensors(after))
        waiting.join(120)
    before, switched = load_decoder(folder), 0
    for request, completion in zip(requests, made, strict=True):
        versions, logprobs = completion.versions, torch.tensor(completion.logprobs)
        assert list(versions) == sorted(versions) and set(versions) <= {3, 4}
        old = versions.count(3)
        torch.testing.assert_close(
            logprobs[:old], our_logprobs(before, request, completion)[:old], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(logprobs[old:], our_logprobs(after, request, completion)[old:], atol=1e-5, rtol=1e-5)
        switched += 0 < old < len(versions)
    assert switched, "no request ran through the sync"


def test_weights_that_come_in_buckets_by_broadcast_are_held(synced: VllmGenerator, folder: Path, monkeypatch):
    monkeypatch.setattr(weight_transfer, "BUCKET_BYTES", 1 << 17)
    after = changed(folder)
    largest = max(parameter.numel() for parameter in after.parameters())
    sender = Sender(torch.device("cpu"), lambda part: hf_tensors(after), largest=largest)
    address = sender.meet("127.0.0.1")
    joining = threading.Thread(target=lambda: sender.join(world_size=1 + synced.workers(), timeout_s=60))
    joining.start()
    synced.join(address, 1, 1 + synced.workers(), 60.0)
    joining.join()
    sender.start("float32")
    synced.begin_sync(6)
    count = 0
    while packed := sender.fill():
        sending = threading.Thread(target=sender.send)
        sending.start()
        synced.load_bucket(packed)
        sending.join()
        count += 1
    assert count > 2
    assert synced.end_sync() == sender.digest("float32") == digest(hf_tensors(after))
    (made,) = synced.generate([asked(5, new=4)])
    assert set(made.versions) == {6}


def test_a_temperature_that_vllm_would_change_is_refused(synced: VllmGenerator):
    with pytest.raises(ConfigError, match=r"temperature 0\.005"):
        synced.generate([asked(1, temperature=0.005)])


def test_a_prompt_longer_than_the_model_is_the_callers_error_and_the_engine_goes_on(synced: VllmGenerator):
    with pytest.raises(DataError, match="a prompt of 1100 tokens leaves no room in the 1024 of the engine"):
        synced.generate([asked(5), asked(*([5] * 1100))])
    assert not synced.steps.running, "a part of a call that is refused is not sampled"
    assert len(synced.generate([asked(5, new=3)])[0].token_ids) <= 3


def test_an_engine_that_fails_is_named_to_all_who_wait_and_to_who_comes_later(synced: VllmGenerator, monkeypatch):
    def broken(version: int):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(synced.steps, "step", broken)
    for _ in range(2):
        with pytest.raises(ComputeError, match="vllm's engine failed: RuntimeError: CUDA error: an illegal"):
            synced.generate([asked(5)])


def test_experts_are_refused_on_a_cpu_where_a_sync_would_not_reach_them(tmp_path: Path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    folder = model_folder(tmp_path / "m", model_type="qwen3_moe", **experts)
    with pytest.raises(ComputeError, match="on a CPU it keeps experts in an order that a sync cannot write"):
        VllmGenerator(model_uri=str(folder), stop_ids=(7,), pad_id=0)
