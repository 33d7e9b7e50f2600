"""The model shapes that GPU benchmarks share: Qwen3's dense sizes, tied up to 4B as published."""

from typing import Any

SIZES = {
    "tiny": (128, 2, 4, 2, 32, 384, 1024),
    "0.6b": (1024, 28, 16, 8, 128, 3072, 151_936),
    "1.7b": (2048, 28, 16, 8, 128, 6144, 151_936),
    "4b": (2560, 36, 32, 8, 128, 9728, 151_936),
    "8b": (4096, 36, 32, 8, 128, 12_288, 151_936),
}
"""Hidden size, layers, heads, key-value heads, head_dim, MLP size, vocabulary; Qwen3's own but for the first."""


def hf_config(size: str) -> dict[str, Any]:
    """config.json of a Qwen3 of that size."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("head_dim", "intermediate_size", "vocab_size")
    return dict(zip(names, SIZES[size], strict=True)) | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "tie_word_embeddings": size != "8b",
        "max_position_embeddings": 40_960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rms_norm_eps": 1e-6,
        "dtype": "bfloat16",
    }
