"""Small random Hugging Face models of every family that the decoder defines, and configs drawn at random."""

from pathlib import Path
from typing import Any

import numpy as np

from posttrain.model.random_model import write_random_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "gpt_oss")


def random_config(family: str, seed: int) -> dict[str, Any]:
    """A small config.json of `family`, sizes and flags drawn from `seed`: GQA ratios, windows, RoPE, experts."""
    rng = np.random.default_rng([seed, FAMILIES.index(family)])

    def pick(*choices):
        return choices[int(rng.integers(len(choices)))]

    kv_heads, group = pick(1, 2, 3), pick(1, 2, 3, 4)
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": pick(64, 97, 130, 191),
        "hidden_size": pick(32, 48, 72),
        "num_hidden_layers": pick(1, 2, 3, 4),
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": pick(8, 16, 24),
        "intermediate_size": pick(32, 40, 64),
        "max_position_embeddings": 256,
        "tie_word_embeddings": pick(True, False),
        "rope_parameters": _rope(pick, family),
    }
    config["num_layers_seen"] = config["num_hidden_layers"]
    config |= _flags(family, config, pick)
    del config["num_layers_seen"]
    return config


def _rope(pick, family: str) -> dict[str, Any]:
    plain = {"rope_type": "default", "rope_theta": pick(1e4, 5e5)}
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": pick(2.0, 8.0)}
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": pick(8.0, 32.0),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": pick(16, 64),
    }
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": pick(4.0, 32.0),
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": pick(True, False),
        "original_max_position_embeddings": pick(16, 64),
    }
    if family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": 1e4}
        return {"sliding_attention": local, "full_attention": pick(plain, linear)}
    return yarn if family == "gpt_oss" else pick(plain, linear, llama3, yarn)


def _flags(family: str, config: dict[str, Any], pick) -> dict[str, Any]:
    layers = config["num_layers_seen"]
    kinds = [pick("sliding_attention", "full_attention") for _ in range(layers)]
    match family:
        case "llama":
            # Its config wants heads to divide the hidden size, though head_dim is its own.
            return {"hidden_size": pick(72, 144), "attention_bias": pick(True, False), "mlp_bias": pick(True, False)}
        case "mistral":
            return {"sliding_window": pick(None, 1, 7, 300)}
        case "qwen2":  # its heads share the hidden size out among them
            return {"hidden_size": config["head_dim"] * config["num_attention_heads"], "head_dim": config["head_dim"]}
        case "qwen3":
            window = {"use_sliding_window": True, "sliding_window": pick(3, 16), "layer_types": kinds}
            return {"attention_bias": pick(True, False), **pick({}, window)}
        case "qwen3_moe":
            return {
                "num_experts": pick(2, 4, 8),
                "num_experts_per_tok": pick(1, 2),
                "moe_intermediate_size": pick(16, 24),
                "norm_topk_prob": pick(True, False),
                "mlp_only_layers": pick([], [0]),
                "decoder_sparse_step": pick(1, 2),
            }
        case "gemma3_text":
            window = {"sliding_window": pick(2, 9, 64), "layer_types": kinds, "hidden_size": pick(72, 144)}
            return {**window, "query_pre_attn_scalar": pick(16, 24), "attention_bias": pick(True, False)}
        case _:
            window = {"sliding_window": pick(2, 9, 64), "layer_types": kinds}
            return {**window, "num_local_experts": pick(2, 4, 8), "num_experts_per_tok": pick(1, 2)}


def random_model(config: dict[str, Any], folder: str | Path, *, seed: int = 0, std: float = 0.2) -> Path:
    """A model folder of `config` with every parameter drawn, norms and sinks too."""
    return write_random_model(folder, config, seed=seed, std=std)
