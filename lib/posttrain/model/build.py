"""A fresh model: a Hugging Face config.json and randomly drawn weights in a folder."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.model.decoder import Decoder
from posttrain.model.export import write_weights
from posttrain.model.families import decoder_config


def fresh_config(
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    mlp_size: int,
    max_length: int,
) -> dict[str, Any]:
    """config.json of a small Qwen3 with tied embeddings; head_dim is hidden_size / num_heads."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": hidden_size // num_heads,
        "intermediate_size": mlp_size,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": max_length,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "use_sliding_window": False,
        "initializer_range": 0.02,
        "dtype": "float32",
    }


def build_model(folder: str | Path, hf_config: dict[str, Any], *, seed: int) -> int:
    """Write config.json and model.safetensors with weights drawn from `seed`; return the parameter count."""
    model = Decoder(decoder_config(hf_config))
    draw_weights(model, std=hf_config["initializer_range"], seed=seed)
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
    write_weights(folder, model)
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def draw_weights(model: Decoder, *, std: float, seed: int) -> None:
    """Matrices are normal with `std`, those that write to the residual stream scaled by 1 / sqrt(2 * layers)
    (GPT-2, section 2.3); norms multiply by one; biases and sinks are zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        *_, owner, leaf = name.split(".")
        if leaf.endswith("bias") or leaf == "sinks":
            nn.init.zeros_(parameter)
        elif owner.endswith("norm"):
            nn.init.constant_(parameter, 1.0 - model.config.norm_offset)
        else:
            residual = "o_proj" in (owner, leaf) or "down_proj" in (owner, leaf)
            scale = (2 * model.config.num_layers) ** -0.5 if residual else 1.0
            nn.init.normal_(parameter, std=std * scale, generator=generator)
