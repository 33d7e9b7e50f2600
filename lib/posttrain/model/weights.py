"""Names of a parameter here and in a Hugging Face checkpoint, as data."""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from posttrain.errors import ModelError
from posttrain.model.decoder import Decoder

QWEN3_NAMES = (
    (r"embedding\.weight", "model.embed_tokens.weight"),
    (r"layers\.(\d+)\.attention_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"layers\.(\d+)\.attention\.(\w+)\.weight", r"model.layers.\1.self_attn.\2.weight"),
    (r"layers\.(\d+)\.mlp_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"layers\.(\d+)\.mlp\.(\w+)\.weight", r"model.layers.\1.mlp.\2.weight"),
    (r"norm\.weight", "model.norm.weight"),
    (r"output_head\.weight", "lm_head.weight"),
)
"""Ours -> theirs (transformers modeling_qwen3). First full match wins."""

FAMILY_NAMES = {"qwen3": QWEN3_NAMES}


def hf_name(name: str, family: str) -> str:
    """The Hugging Face name of one of our parameters."""
    for pattern, theirs in FAMILY_NAMES[family]:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, theirs, name)
    raise AssertionError(f"parameter {name} has no Hugging Face name in family {family}")


def hf_tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Parameters under Hugging Face names, the vocabulary trimmed to its real rows, a tied head left out."""
    config = model.config
    for name, parameter in model.named_parameters():  # yields a tied tensor once, as the embedding
        tensor = parameter.detach()
        if tensor.shape[0] == config.padded_vocab_size and name in ("embedding.weight", "output_head.weight"):
            tensor = tensor[: config.vocab_size]
        yield hf_name(name, config.family), tensor


def check_names(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Refuse a checkpoint whose tensor names or shapes differ from the decoder's.

    Raises:
        ModelError: lists up to ten differences.
    """
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [f"unexpected {name} {shape}" for name, shape in found.items() if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ModelError(f"{where}: tensors do not match config.json: {shown}")
