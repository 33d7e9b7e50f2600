"""Hugging Face configs become one DecoderConfig; a family is a mapping of flags, never forward code."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.errors import ModelError
from posttrain.model.layers import ACTIVATIONS
from posttrain.model.rope import Rope, rope_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The mixture of experts that stands where a dense MLP would."""

    count: int
    top_k: int
    mlp_size: int
    layers: tuple[bool, ...]
    """Which layers have experts."""
    softmax_first: bool
    """Softmax over all experts in float32, then the top k (Qwen3); else over the chosen logits alone (GPT-OSS)."""
    normalize: bool = False
    """Scale the k weights to sum to one (Qwen3's norm_topk_prob)."""
    bias: bool = False
    """Biases on router and experts, and the clamped SwiGLU (GPT-OSS)."""
    limit: float = 7.0
    """Clamp of GPT-OSS's gate (from above) and up projection (both sides)."""
    alpha: float = 1.702
    """Gain inside GPT-OSS's sigmoid."""


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
    activation: str
    norm_eps: float
    max_length: int
    """Longest position the model was made for, tokens."""
    tied_embeddings: bool
    ropes: tuple[Rope, ...]
    """One a layer."""
    windows: tuple[int | None, ...]
    """Of each layer: a token sees itself and window - 1 before it; None sees the whole document."""
    attention_scale: float
    """On q k^T."""
    qk_norm: bool = False
    """RMSNorm over head_dim on queries and keys."""
    qkv_bias: bool = False
    output_bias: bool = False
    """On the attention's output projection."""
    mlp_bias: bool = False
    sinks: bool = False
    """A learned logit a head that takes part in the softmax and has no value (GPT-OSS)."""
    norm_cast_first: bool = True
    norm_offset: float = 0.0
    """See RMSNorm."""
    sandwich_norms: bool = False
    """Norms also after attention and after the MLP, before the residual is added (Gemma3)."""
    embedding_scale: float = 1.0
    experts: Experts | None = None
    heads: dict[str, int | str] = field(default_factory=dict)
    """Score heads beside or in place of the LM head, by name; see heads.py. Hugging Face's own is `score`."""
    lm_head: bool = True
    """Off in a model that only scores."""

    @property
    def attention_width(self) -> int:
        """Multiply-adds of the attention proper for one pair of positions, against one a parameter for a token."""
        return self.num_layers * self.num_heads * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to 64.

        A width that is no multiple of 64 drops the head's matmul to a slow kernel: five times the time
        on an H200 (benchmarks/lm_head.py), three by Netflix's report (TechBlog, 2026-02-13).
        """
        return -(-self.vocab_size // 64) * 64


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Read a Hugging Face config.json, its missing fields filled as transformers fills them.

    Raises:
        ModelError: the architecture is not one that the decoder defines, or uses a
            feature that it does not.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ModelError(
            f"model_type {family!r} is not defined here; defined: {', '.join(FAMILIES)}. "
            "Fix: set model.backend: transformers, which trains its own class with fewer optimisations"
        )
    config = parse_config(hf)
    _refuse_undefined(family, config)
    size = {
        "family": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "mlp_size": config.intermediate_size,
        "activation": _activation(config),
        "norm_eps": config.rms_norm_eps,
        "max_length": config.max_position_embeddings,
        "tied_embeddings": config.tie_word_embeddings,
    }
    flags = {
        "windows": _windows(config),
        "ropes": _ropes(config, size["head_dim"]),
        "attention_scale": size["head_dim"] ** -0.5,
        **_heads(config),
    }
    return DecoderConfig(**size | flags | FAMILIES[family](config))


def _llama(config: Any) -> dict[str, Any]:
    biased = config.attention_bias
    return {"qkv_bias": biased, "output_bias": biased, "mlp_bias": config.mlp_bias}


def _mistral(config: Any) -> dict[str, Any]:
    return {}


def _qwen2(config: Any) -> dict[str, Any]:
    return {"qkv_bias": True}


def _qwen3(config: Any) -> dict[str, Any]:
    biased = config.attention_bias
    return {"qk_norm": True, "qkv_bias": biased, "output_bias": biased}


def _qwen3_moe(config: Any) -> dict[str, Any]:
    layers = tuple(
        number not in config.mlp_only_layers
        and config.num_experts > 0
        and (number + 1) % config.decoder_sparse_step == 0
        for number in range(config.num_hidden_layers)
    )
    experts = Experts(
        count=config.num_experts,
        top_k=config.num_experts_per_tok,
        mlp_size=config.moe_intermediate_size,
        layers=layers,
        softmax_first=True,
        normalize=config.norm_topk_prob,
    )
    return _qwen3(config) | {"experts": experts}


def _gemma3(config: Any) -> dict[str, Any]:
    biased = config.attention_bias
    return {
        "qk_norm": True,
        "qkv_bias": biased,
        "output_bias": biased,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "norm_cast_first": False,
        "norm_offset": 1.0,
        "sandwich_norms": True,
        "embedding_scale": config.hidden_size**0.5,
    }


def _gpt_oss(config: Any) -> dict[str, Any]:
    experts = Experts(
        count=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        mlp_size=config.intermediate_size,
        layers=(True,) * config.num_hidden_layers,
        softmax_first=False,
        bias=True,
        limit=getattr(config, "swiglu_limit", 7.0),
        alpha=getattr(config, "swiglu_alpha", 1.702),
    )
    biased = config.attention_bias
    return {"qkv_bias": biased, "output_bias": biased, "sinks": True, "norm_cast_first": False, "experts": experts}


FAMILIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma3_text": _gemma3,
    "gpt_oss": _gpt_oss,
}
"""model_type -> the flags by which a family differs from Llama (transformers modeling_<family>)."""


def parse_config(hf: Mapping[str, Any]) -> Any:
    """A config.json as transformers' own class: defaults filled, old spellings of RoPE made new.

    Raises:
        ModelError: transformers does not know the model_type, or refuses the config.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = hf.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        raise ModelError(f"model_type {family!r} is unknown to transformers. Fix: a newer one, or mend config.json")
    try:
        return CONFIG_MAPPING[family].from_dict(dict(hf))
    except Exception as error:  # transformers raises many kinds for a bad field, its validators' own among them
        raise ModelError(f"config.json of {family} is not valid: {' '.join(str(error).split())}") from error


def _refuse_undefined(family: str, config: Any) -> None:
    """Raise for what a config asks of the forward pass and the decoder does not do."""
    quantization = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    undefined = {
        "hidden activation": _activation(config) if _activation(config) not in ACTIVATIONS else None,
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "use_bidirectional_attention": getattr(config, "use_bidirectional_attention", None) or None,
        "attention_dropout": getattr(config, "attention_dropout", None) or None,
        "quantization": method if method not in (None, "mxfp4") else None,
    }
    found = {name: value for name, value in undefined.items() if value is not None}
    if found:
        raise ModelError(f"{family} config uses {found}, which the decoder does not implement")
    for larger, smaller in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
        whole, part = getattr(config, larger), getattr(config, smaller)
        if part and whole % part and not (larger == "hidden_size" and getattr(config, "head_dim", None)):
            raise ModelError(f"{family} config: {larger}={whole} is no multiple of {smaller}={part}")


def _activation(config: Any) -> str:
    return getattr(config, "hidden_activation", None) or config.hidden_act


def _windows(config: Any) -> tuple[int | None, ...]:
    """By `layer_types` where the config has them; else one window for all layers, or none."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * config.num_hidden_layers
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ModelError(f"layer_types {sorted(unknown)} are not defined; defined: full_attention, sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _ropes(config: Any, head_dim: int) -> tuple[Rope, ...]:
    parameters = config.rope_parameters
    kinds = getattr(config, "layer_types", None) or ()
    made = lambda each: rope_of(each, head_dim=head_dim, max_length=config.max_position_embeddings)  # noqa: E731
    if "rope_theta" in parameters:
        return (made(parameters),) * config.num_hidden_layers
    by_kind = {kind: made(parameters[kind]) for kind in set(kinds)}
    return tuple(by_kind[kind] for kind in kinds)


def _heads(config: Any) -> dict[str, Any]:
    """Hugging Face's `score` in a ...ForSequenceClassification, and our own heads by the key that export writes."""
    heads = dict(getattr(config, "posttrain_heads", None) or {})  # heads.CONFIG_KEY
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        return {"heads": {"score": config.num_labels} | heads, "lm_head": False}
    return {"heads": heads}
