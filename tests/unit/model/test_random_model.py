"""Published shapes, cut to what is compared in seconds, keep their flags and agree with transformers."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from posttrain.errors import ModelError
from posttrain.model.families import decoder_config
from posttrain.model.random_model import small_config, write_random_model
from posttrain.model.verify import compare_with_transformers
from tiny_families import FAMILIES, random_config


def published(family: str, sizes: str, **more: Any) -> dict[str, Any]:
    """A config.json in its published spelling; sizes are layers, hidden, heads, KV heads, MLP, vocabulary, length."""
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
    keys += ("intermediate_size", "vocab_size", "max_position_embeddings")
    numbers = map(int, sizes.split())
    return {"model_type": family, **dict(zip(keys, numbers, strict=True)), "torch_dtype": "bfloat16", **more}


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
PUBLISHED = {
    "Qwen2.5-0.5B": published(
        *("qwen2", "24 896 14 2 4864 151936 32768"),
        **{"tie_word_embeddings": True, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "eos_token_id": 151643},
        **{"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 24},
    ),
    "Qwen3-0.6B": published(
        *("qwen3", "28 1024 16 8 3072 151936 40960"),
        **{"head_dim": 128, "tie_word_embeddings": True, "rope_theta": 1e6, "rope_scaling": None},
        **{"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28, "eos_token_id": 151645},
    ),
    "Qwen3-30B-A3B": published(
        *("qwen3_moe", "48 2048 32 4 6144 151936 40960"),
        **{"head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
        **{"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "rope_theta": 1e6},
    ),
    "Llama-3.1-8B": published(
        *("llama", "32 4096 32 8 14336 128256 131072"),
        **{"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192}},
        **{"rms_norm_eps": 1e-5, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]},
    ),
    "Mistral-7B-v0.3": published(
        *("mistral", "32 4096 32 8 14336 32768 32768"),
        **{"rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": None},
    ),
    "gemma-3-1b": published(
        *("gemma3_text", "26 1152 4 1 6912 262144 32768"),
        **{"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6},
        **{"rope_theta": 1e6, "rope_local_base_freq": 1e4, "hidden_activation": "gelu_pytorch_tanh"},
        **{"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0},
    ),
    "gpt-oss-20b": published(
        *("gpt_oss", "24 2880 64 8 2880 201088 131072"),
        **{"head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "attention_bias": True},
        **{"layer_types": ["sliding_attention", "full_attention"] * 12, "sliding_window": 128},
        **{"rope_theta": 150000, "rope_scaling": {**YARN, "original_max_position_embeddings": 4096}},
        **{"pad_token_id": 199999, "eos_token_id": 200002, "quantization_config": {"quant_method": "mxfp4"}},
    ),
}
"""The shape of a published model of every family, by its name."""

SHRINK = {"vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size", "max_length"}
SHRINK |= {"ropes", "windows", "attention_scale", "embedding_scale", "experts"}


def test_every_family_has_a_published_shape():
    assert {each["model_type"] for each in PUBLISHED.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_shape_made_small_agrees_with_transformers(tmp_path, name):
    folder = write_random_model(tmp_path, small_config(PUBLISHED[name]), seed=0)
    found = compare_with_transformers(folder, gradients=True)
    assert found["max_abs_diff"] <= 1e-4 and found["gradient_diff"] <= 1e-3


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_small_config_keeps_flags_ratios_and_kinds(name):
    real, small = decoder_config(PUBLISHED[name]), decoder_config(small_config(PUBLISHED[name]))
    assert {k: v for k, v in asdict(real).items() if k not in SHRINK} == {
        k: v for k, v in asdict(small).items() if k not in SHRINK
    }
    assert small.num_layers <= 4 and small.vocab_size <= 503 and small.hidden_size <= 128 and small.mlp_size <= 192
    assert small.num_kv_heads <= 2 and small.num_heads <= 16 and small.head_dim <= 64
    assert small.num_heads * real.num_kv_heads == real.num_heads * small.num_kv_heads
    assert {window is None for window in small.windows} == {window is None for window in real.windows}
    assert all(window is None or window <= 16 for window in small.windows)
    assert len(set(small.ropes)) == len(set(real.ropes))
    assert [rope.attention_factor for rope in small.ropes[:1]] == [rope.attention_factor for rope in real.ropes[:1]]
    if real.experts:
        assert small.experts is not None
        assert small.experts.top_k < small.experts.count <= 8, "a router that chooses all proves nothing"


def test_scaled_positions_bite_within_a_compared_document():
    for name, kind in (("Llama-3.1-8B", "llama3"), ("gpt-oss-20b", "yarn")):
        config = small_config(PUBLISHED[name])
        assert config["rope_parameters"]["original_max_position_embeddings"] <= 32
        plain = config | {
            "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
        }
        assert config["rope_parameters"]["rope_type"] == kind
        assert decoder_config(config).ropes != decoder_config(plain).ropes


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"mlp_only_layers": [9], "decoder_sparse_step": 1}, [True, True, True, False]),
        ({"mlp_only_layers": [], "decoder_sparse_step": 2}, [False, True, False, True]),
        ({"mlp_only_layers": [], "decoder_sparse_step": 6}, [False, False, False, True]),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, [False, False, False, True]),
    ],
)
def test_dense_layers_stay_among_those_with_experts(tmp_path, config, expected):
    small = small_config(PUBLISHED["Qwen3-30B-A3B"] | config)
    shape = decoder_config(small)
    assert shape.experts is not None and list(shape.experts.layers) == expected
    compare_with_transformers(write_random_model(tmp_path, small, seed=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_config_of_a_small_config_is_itself(family):
    for seed in range(10):
        small = small_config(random_config(family, seed))
        assert small_config(small) == small


def test_special_tokens_lie_in_the_small_vocabulary():
    small = small_config(PUBLISHED["gemma-3-1b"])
    assert (small["bos_token_id"], small["eos_token_id"], small["pad_token_id"]) == (2, [1, 106], 0)
    assert small_config(PUBLISHED["gpt-oss-20b"])["pad_token_id"] is None


def test_random_weights_depend_on_the_seed_alone(tmp_path):
    state = torch.get_rng_state()
    small = small_config(PUBLISHED["gpt-oss-20b"])
    files = [write_random_model(tmp_path / str(n), small, seed=seed) for n, seed in enumerate((0, 0, 1))]
    first, again, other = ((folder / "model.safetensors").read_bytes() for folder in files)
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state), "the process's own generator is left alone"


def test_norms_biases_and_sinks_are_drawn_around_where_they_start(tmp_path):
    weights = load_file(
        write_random_model(tmp_path / "a", small_config(PUBLISHED["gpt-oss-20b"]), seed=0) / "model.safetensors"
    )
    assert abs(weights["model.norm.weight"].mean() - 1) < 0.1
    assert weights["model.layers.0.self_attn.sinks"].std() > 0.05
    assert weights["model.layers.0.self_attn.q_proj.bias"].std() > 0.05
    gemma = load_file(
        write_random_model(tmp_path / "b", small_config(PUBLISHED["gemma-3-1b"]), seed=0) / "model.safetensors"
    )
    assert abs(gemma["model.norm.weight"].mean()) < 0.1 and gemma["model.norm.weight"].std() > 0.05


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nobody"}, "model_type 'nobody' is unknown to transformers"),
        ({}, "model_type None is unknown"),
        ({"model_type": "qwen3", "hidden_size": "wide"}, "config.json of qwen3 is not valid"),
    ],
)
def test_a_config_that_transformers_does_not_take_is_refused(config, message):
    with pytest.raises(ModelError, match=message):
        small_config(config)
