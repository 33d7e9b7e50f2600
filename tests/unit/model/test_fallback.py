"""The fallback trains what it can prove, like the decoder where both can, and names what it cannot."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actors import engine_over
from posttrain.compute.collective import Ranks
from posttrain.config import RunConfig
from posttrain.data.batch import collate
from posttrain.data.sample import shift
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.types import Batch, Pack
from posttrain.errors import ModelError
from posttrain.model import fallback
from posttrain.model.fallback import LOST, export_native, load_native, native_tensors, prove, verify_native
from posttrain.model.forward import forward, logits, loss_sum
from posttrain.model.load import load_decoder
from posttrain.model.losses.sft import SFTLoss
from posttrain.model.verify import open_transformers
from posttrain.model.weights import hf_tensors, to_hf
from runs import metrics, prepared, small_config
from steps.evaluate import evaluate
from steps.export import export
from steps.grpo import grpo
from steps.prepare import prepare
from steps.train import train
from tiny import tiny_model
from tiny_families import random_model

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def native_folder(folder: Path, family: str, **more: Any) -> Path:
    return random_model({"model_type": family, **SHAPE, **more}, folder)


def batch_of_five(*, vocab_size: int = 97, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    lengths = (13, 1, 30, 2, 9)
    samples = tuple(shift(rng.integers(0, vocab_size, n + 1).tolist(), [1.0] * (n + 1)) for n in lengths)
    return collate(Pack(samples=samples, num_units=len(samples)), pack_tokens=64)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def one_rank() -> Ranks:
    return Ranks(rank=0, world_size=1, meeting="", timeout_s=60, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("olmo2", {}),
        ("olmo2", {"tie_word_embeddings": True}),
        ("phi3", {}),
        ("gpt2", {}),
        ("smollm3", {}),
        ("granite", {"logits_scaling": 1.0}),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": None}),
    ],
)
def test_an_undefined_architecture_scores_packs_as_transformers_scores_documents(tmp_path, family, more):
    folder = native_folder(tmp_path, family, **more)
    model, batch = load_native(folder), batch_of_five()
    theirs = open_transformers(folder)
    got = forward(model, batch).logprobs  # pyright: ignore[reportArgumentType]
    ends = batch.cu_seqlens.tolist()[:6]
    with torch.no_grad():
        alone = [theirs(batch.input_ids[None, a:b]).logits[0] for a, b in pairwise(ends)]
    expected = torch.cat(alone).double().log_softmax(-1).gather(-1, batch.target_ids[: ends[-1], None])[:, 0]
    torch.testing.assert_close(got, expected.float(), atol=1e-5, rtol=1e-4)
    assert model.config.attention_width == 2 * 32 and model.config.max_length == 128


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("granite", {"logits_scaling": 8.0}, "granite changes its logits after the head.*logits_scaling"),
        ("cohere", {}, "cohere changes its logits after the head.*logit_scale"),
        ("gemma2", {"head_dim": 8}, "gemma2 changes its logits after the head.*final_logit_softcapping"),
        ("phi", {}, "phi has no plain LM head"),
        ("mamba", {"state_size": 4, "max_position_embeddings": None}, "mamba has no max_position_embeddings.*mix"),
        ("mamba", {"state_size": 4}, "mamba would mix documents"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "lfm2 would mix documents"),
        ("falcon", {}, "falcon would mix documents"),
        ("llama4_text", {}, "attends in chunks"),
        ("olmo2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("mixtral", {"num_local_experts": 2}, "mixtral differ in name or shape.*stacked experts"),
    ],
)
def test_what_cannot_be_trained_on_packs_is_refused_by_name(tmp_path, family, more, message):
    folder = native_folder(tmp_path, family, **more)
    with pytest.raises(ModelError, match=message):
        load_native(folder)


@pytest.mark.parametrize(("family", "more"), [("granite", {"logits_scaling": 8.0}), ("cohere", {})])
def test_logits_changed_by_an_unknown_setting_are_found_by_the_numbers(tmp_path, monkeypatch, family, more):
    monkeypatch.setattr(fallback, "LOGITS_CHANGED", {})
    with pytest.raises(ModelError, match=f"{family} changes its logits after the head, by "):
        load_native(native_folder(tmp_path, family, **more))


def test_weights_in_which_a_leak_would_not_show_prove_nothing(tmp_path):
    model = load_native(native_folder(tmp_path, "olmo2"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "post_attention_layernorm" in name:
                parameter.zero_()
    with pytest.raises(ModelError, match="olmo2 cannot be proved to keep documents apart"):
        prove(model)


def test_a_leak_in_one_position_is_refused(tmp_path, monkeypatch):
    model = load_native(native_folder(tmp_path, "olmo2"))
    inner = model.model.base_model.forward
    monkeypatch.setattr(model.model.base_model, "forward", lambda **given: inner(**given | {"position_ids": None}))
    with pytest.raises(ModelError, match="olmo2 would mix documents"):
        prove(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
        ({"model_type": "nothing"}, "model_type 'nothing' has no causal LM"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized"),
        ({"num_hidden_layers": 3}, "tensors of olmo2 differ in name or shape"),
        ({"intermediate_size": 40}, "tensors of olmo2 differ in name or shape"),
        ({"max_position_embeddings": "many"}, "config.json of olmo2 is not valid"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_before_weights_are_read(tmp_path, monkeypatch, change, message):
    folder = native_folder(tmp_path, "olmo2")
    change_config(folder, **change)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(ModelError, match=message):
        load_native(folder)


def test_what_is_lost_is_said_once(tmp_path, capfd):
    fallback._say_once.cache_clear()
    folder = native_folder(tmp_path, "olmo2")
    for _ in range(2):
        load_native(folder)
    assert capfd.readouterr().out == LOST + "\n" and "\n" not in LOST


def test_the_fallback_is_the_decoder_in_logits_loss_and_gradients(tmp_path):
    folder = tiny_model(tmp_path)
    ours, native = load_decoder(folder), load_native(folder)
    batch = batch_of_five(vocab_size=ours.config.vocab_size)
    size = batch.cu_seqlens[5]
    got, want = (logits(model, batch)[:size] for model in (native, ours))  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    losses = [loss_sum(model, batch, SFTLoss())[0] for model in (ours, native)]  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(losses[1], losses[0], atol=0, rtol=1e-5)
    gradients = []
    for model, loss in zip((ours, native), losses, strict=True):
        named = dict(model.named_parameters())
        gradients.append(dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)))
    expected = dict(pair for name, each in gradients[0].items() for pair in to_hf(ours.config, name, each))
    got = {name.removeprefix("model."): each for name, each in gradients[1].items()}
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        assert float((got[name] - want).norm()) <= 1e-4 * float(want.norm()), name


def test_the_engine_trains_the_fallback_as_it_trains_the_decoder(tmp_path):
    folder = tiny_model(tmp_path)
    ours, native = load_decoder(folder), load_native(folder)
    engines = engine_over(ours, hf_tensors, one_rank()), engine_over(native, native_tensors, one_rank())
    for step in range(3):
        batches = [batch_of_five(vocab_size=ours.config.vocab_size, seed=10 * step + n) for n in range(2)]
        tokens = float(sum(batch.loss_mask.sum() for batch in batches))
        first, second = (each.train_step(step, batches, SFTLoss(), denominator=tokens) for each in engines)
        assert second["loss"] == pytest.approx(first["loss"], abs=1e-5)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)
    weights = dict(engines[0].weights())
    for name, tensor in engines[1].weights():
        torch.testing.assert_close(tensor, weights.pop(name), atol=2e-5, rtol=0)
    assert not weights


@pytest.mark.parametrize("tied", [False, True])
def test_an_export_is_the_folder_it_came_from(tmp_path, tied):
    source = native_folder(tmp_path / "a", "olmo2", tie_word_embeddings=tied)
    facts = export_native(load_native(source), tmp_path / "b", like=source)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    assert ("lm_head.weight" in after) != tied and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert facts["parameters"] == sum(tensor.numel() for tensor in before.values()) and facts["vocab_size"] == 97
    found = verify_native(tmp_path / "b", source)
    assert found["max_abs_diff"] <= 1e-4 and found["top1_agreement"] > 0.99 and found["weights_equal"]


def test_an_export_with_one_other_bit_is_refused(tmp_path):
    source = native_folder(tmp_path / "a", "olmo2")
    export_native(load_native(source), tmp_path / "b", like=source)
    path = tmp_path / "b" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"].view(torch.int32)[3] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"\['model.norm.weight'\] are not bitwise what was trained"):
        verify_native(tmp_path / "b", source)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An OLMo2 of random weights, brought through prepare and tokenize of a run of its own."""
    folder = tmp_path_factory.mktemp("olmo2")
    base = prepared(folder / "tokens", small_config())
    tokenizer = shutil.ignore_patterns("*.safetensors", "config.json", "manifest*")
    shutil.copytree(base.model_uri, folder / "model", ignore=tokenizer)
    size = json.loads(Path(base.model_uri, "config.json").read_text())["vocab_size"]
    source = native_folder(folder / "model", "olmo2", vocab_size=size)
    config, root = fallback_config(source, "transformers"), folder / "run"
    root.mkdir()
    made = prepared(root, config)
    return SimpleNamespace(
        config=config,
        source=source,
        root=str(root),
        model=prepare(config, root=str(root))["model"],
        tokens_uri=made.tokens_uri,
        tokenizer_sha256=BaseHFModelTokenizer(base.model_uri).fingerprint(),
    )


def fallback_config(path: Path, backend: str) -> RunConfig:
    short = {"warmup.num_steps": 3, "optim.num_steps": 2, "optim.warmup_steps": 0, "optim.lr": 1e-3}
    model = {"model.fresh": None, "model.path": str(path), "model.backend": backend}
    return small_config(**model, **short, **{"parallel.data": 1, "method.kl_coef": 0.0, "eval.samples": 1})


def test_prepare_takes_an_undefined_architecture_with_the_fallback_alone(run, tmp_path):
    assert (run.model["family"], run.model["hidden_size"]) == ("olmo2", 32)
    with pytest.raises(ModelError, match=r"olmo2.*Fix: set model\.backend: transformers"):
        prepare(fallback_config(run.source, "posttrain"), root=str(tmp_path))


def test_a_run_warms_up_and_exports_an_undefined_architecture(run):
    done = train(run.config, root=run.root, model_uri=run.model["uri"], tokens_uri=run.tokens_uri)
    assert done["steps"] == 3 and done["loss_last"] < done["loss_first"]
    facts = {"versions": {}, "flow": "f", "run_id": "1", "config_sha256": "0", "seed": 0}
    proved = {"provenance": facts, "evaluation": {}, "tokenizer_sha256": run.tokenizer_sha256}
    exported = export(run.config, root=run.root, model_uri=done["model_uri"], **proved)
    assert exported["weights_equal"] and exported["max_abs_diff"] <= 1e-4
    opened, before = open_transformers(exported["uri"]), open_transformers(run.source)
    assert opened.config.model_type == "olmo2"
    assert any(not torch.equal(a, b) for a, b in zip(opened.parameters(), before.parameters(), strict=True))


@pytest.mark.slow
def test_a_run_samples_from_and_scores_an_undefined_architecture(run):
    done = grpo(run.config, root=run.root, model_uri=run.model["uri"], tokens_uri=run.tokens_uri)
    assert done is not None
    steps = metrics(Path(run.root, "metrics", "grpo.jsonl"))
    # Without a leak between documents and with equal weights, what the sampler said is what the trainer computes.
    assert len(steps) == 2 and all(step["policy/mismatch_abs"] < 1e-4 for step in steps)
    assert steps[0]["policy/kl"] == pytest.approx(0, abs=1e-6) and steps[1]["policy/kl"] > 1e-5
    found = evaluate(run.config, tokens_uri=run.tokens_uri, models={"after": done["model_uri"]})
    assert 0 <= found["after"]["greedy_reward"] <= 1
