"""Every family is transformers' function, forward and backward, over random shapes; the verifier sees it when not."""

import json

import pytest
import torch

from posttrain.errors import ModelError
from posttrain.model import verify
from posttrain.model.export import export_model
from posttrain.model.load import load_decoder
from posttrain.model.verify import compare_with_transformers
from tiny_families import FAMILIES, random_config, random_model


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_model_agrees_with_transformers_and_survives_a_round_trip(tmp_path, family, seed):
    folder = random_model(random_config(family, seed), tmp_path / "theirs", seed=seed)
    found = compare_with_transformers(folder, seed=seed, gradients=True)
    assert found["max_abs_diff"] <= 1e-4 and found["gradient_diff"] <= 1e-3
    export_model(load_decoder(folder, dtype=None), tmp_path / "ours", like=folder)
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "ours" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def _without_positions(monkeypatch):
    monkeypatch.setattr("posttrain.model.attention.rotate", lambda x, cos, sin: x)


def _other_router(monkeypatch):
    from posttrain.model.moe import Router

    choose = Router.choose
    monkeypatch.setattr(Router, "choose", lambda self, x: (choose(self, x)[0] * 1.01, choose(self, x)[1]))


def _leaking_documents(monkeypatch):
    from posttrain.model.attention import Layout

    whole = Layout.of

    def leak(batch, **settings):
        merged = whole(batch, **settings)
        zeros, last = torch.zeros_like(batch.doc_id), torch.arange(len(batch.doc_id))
        ends = torch.tensor([0, len(last)])
        return type(merged)(backend="sdpa", doc_id=zeros, position_ids=last, cu_seqlens=ends, longest=ends[1])

    monkeypatch.setattr(Layout, "of", staticmethod(leak))


@pytest.mark.parametrize(
    ("family", "fault", "message"),
    [
        ("qwen3", _without_positions, r"logits differ .* module that differs: layers\.0\.attention \(model\.layers\.0"),
        ("gemma3_text", _without_positions, r"module that differs: layers\.\d\.attention \("),
        ("gpt_oss", _other_router, r"module that differs: layers\.0\.mlp \(model\.layers\.0\.mlp\)"),
        ("llama", _leaking_documents, "packed logits differ"),
    ],
)
def test_a_fault_is_refused_and_its_module_named(tmp_path, monkeypatch, family, fault, message):
    folder = random_model(random_config(family, 1) | {"vocab_size": 64}, tmp_path)
    fault(monkeypatch)
    with pytest.raises(ModelError, match=message):
        compare_with_transformers(folder)


def test_a_wrong_gradient_behind_right_logits_is_refused(tmp_path, monkeypatch):
    folder = random_model(random_config("qwen3", 0), tmp_path)
    ours = verify._ours

    def slipped(*arguments):
        logits, gradients = ours(*arguments)
        return logits, {name: gradient * (1.01 if "k_proj" in name else 1) for name, gradient in gradients.items()}

    monkeypatch.setattr(verify, "_ours", slipped)
    with pytest.raises(ModelError, match="a gradient differs"):
        compare_with_transformers(folder, gradients=True)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"model_type": "mamba"}, "model_type 'mamba' is not defined.*model.backend: transformers"),
        ("llama", {"hidden_act": "relu"}, "hidden activation.*relu"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("qwen3", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic'",
        ),
        ("qwen3", {"num_key_value_heads": 5}, "is no multiple of num_key_value_heads=5"),
        ("qwen3", {"hidden_size": "wide"}, "config.json of qwen3 is not valid"),
    ],
)
def test_what_the_decoder_does_not_do_is_refused_by_name(tmp_path, family, change, message):
    config = random_config(family, 2) | {"num_attention_heads": 4, "num_key_value_heads": 2} | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load_decoder(tmp_path)
