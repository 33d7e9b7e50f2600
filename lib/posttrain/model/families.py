"""Hugging Face configs become one DecoderConfig; a family is a mapping, never forward code."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """The shape of a Decoder, whatever its family."""

    family: str
    vocab_size: int
    """Rows that mean a token; the embedding may hold more, padded to a multiple of 64."""
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    norm_eps: float
    rope_theta: float
    max_length: int
    """Longest position the model was made for, tokens."""
    tied_embeddings: bool
    qk_norm: bool
    """RMSNorm over head_dim on queries and keys (Qwen3)."""

    @property
    def attention_width(self) -> int:
        """Multiply-adds of the attention proper for one pair of positions, against one a parameter for a token."""
        return self.num_layers * self.num_heads * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to 64.

        A width that is no multiple of 64 drops the head's matmul to a slow kernel:
        Netflix reports three times (TechBlog, 2026-02-13).
        """
        return -(-self.vocab_size // 64) * 64


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Read the fields of a Hugging Face config.json.

    Raises:
        ModelError: the architecture is not one that the decoder defines, or uses a
            feature that it does not.
    """
    family = hf.get("model_type")
    match family:
        case "qwen3":
            return _qwen3(hf)
        case _:
            raise ModelError(f"model_type {family!r} is not defined here; defined: qwen3")


def _qwen3(hf: Mapping[str, Any]) -> DecoderConfig:
    """Qwen3 dense: RMSNorm, SwiGLU, per-head qk-norm, no biases (transformers modeling_qwen3)."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        "rope_type": kind if kind != "default" else None,
        "attention_bias": hf.get("attention_bias") or None,
        "use_sliding_window": hf.get("use_sliding_window") or None,
        "hidden_act": hf["hidden_act"] if hf.get("hidden_act", "silu") != "silu" else None,
    }
    unknown = {name: value for name, value in refused.items() if value is not None}
    if unknown:
        raise ModelError(f"qwen3 config uses {unknown}, which the decoder does not implement")
    theta = rope.get("rope_theta", hf.get("rope_theta"))
    if theta is None:
        raise ModelError("qwen3 config has neither rope_theta nor rope_parameters.rope_theta")
    return DecoderConfig(
        family="qwen3",
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
        mlp_size=hf["intermediate_size"],
        norm_eps=hf["rms_norm_eps"],
        rope_theta=theta,
        max_length=hf["max_position_embeddings"],
        tied_embeddings=hf["tie_word_embeddings"],
        qk_norm=True,
    )
