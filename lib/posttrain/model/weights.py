"""Where a parameter lies in a Hugging Face checkpoint, as data that is read in both directions.

A parameter of ours is one or more pieces of theirs: one name for most, two a layer's expert for stacked
experts (Qwen3-MoE), every second row for interleaved gates (GPT-OSS). Loading reads pieces, export writes them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import ModelError
from posttrain.model.collectives import full
from posttrain.model.families import DecoderConfig
from posttrain.model.heads import NATIVE
from posttrain.model.lora import merged_weight

Index = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of one of our parameters, and where its values are in a checkpoint: ours[region] = theirs[index]."""

    theirs: str
    """Name of the tensor in the checkpoint."""
    region: Index = ()
    """Part of our parameter; () is all of it."""
    index: Index = ()
    """Part of the checkpoint's tensor."""
    transposed: bool = False
    """theirs[index] has its last two dimensions the other way round."""
    scales: str | None = None
    """MXFP4: `theirs` holds packed blocks, this their scales; `index` counts in what they decode to."""


NAMES = (
    (r"embedding\.weight", "model.embed_tokens.weight"),
    (r"norm\.weight", "model.norm.weight"),
    (r"output_head\.weight", "lm_head.weight"),
    (r"heads\.(\w+)\.weight", r"\1.weight"),
    (r"layers\.(\d+)\.attention_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"layers\.(\d+)\.attention\.(.+)", r"model.layers.\1.self_attn.\2"),
    (r"layers\.(\d+)\.mlp_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"layers\.(\d+)\.mlp\.(.+)", r"model.layers.\1.mlp.\2"),
)
"""Ours -> theirs where they differ in name alone. First full match wins."""

FAMILY_NAMES = {
    "qwen3_moe": ((r"layers\.(\d+)\.mlp\.router\.weight", r"model.layers.\1.mlp.gate.weight"),),
    "gemma3_text": (
        (r"layers\.(\d+)\.attention_out_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
        (r"layers\.(\d+)\.mlp_norm\.weight", r"model.layers.\1.pre_feedforward_layernorm.weight"),
        (r"layers\.(\d+)\.mlp_out_norm\.weight", r"model.layers.\1.post_feedforward_layernorm.weight"),
    ),
}
"""What a family names otherwise than NAMES."""

VOCABULARY = ("embedding.weight", "output_head.weight")
"""Parameters with a row a token, padded here and trimmed in a checkpoint."""


def hf_name(config: DecoderConfig, name: str) -> str:
    """The Hugging Face name of one of our parameters that has one."""
    for pattern, theirs in (*FAMILY_NAMES.get(config.family, ()), *NAMES):
        if re.fullmatch(pattern, name):
            return re.sub(pattern, theirs, name)
    raise AssertionError(f"parameter {name} has no Hugging Face name in family {config.family}")


def is_native(config: DecoderConfig, name: str) -> bool:
    """Whether a parameter is one that Hugging Face's own class has: not of our heads, nor of an adapter."""
    if name.startswith("heads."):
        return not config.lm_head and name == f"heads.{NATIVE}.weight"
    return ".adapter." not in name


def pieces(config: DecoderConfig, name: str, shape: tuple[int, ...], *, quantized: bool = False) -> tuple[Piece, ...]:
    """Where the parameter `name` of full `shape` lies in a checkpoint of this family.

    Args:
        quantized: the checkpoint's expert matrices are MXFP4 (GPT-OSS as it is published).
    """
    if name in VOCABULARY:
        return (Piece(theirs=hf_name(config, name), region=(slice(0, config.vocab_size),)),)
    if ".mlp.experts." in name:
        expert = _gpt_oss_experts if config.family == "gpt_oss" else _numbered_experts
        return expert(hf_name(config, name), shape, quantized=quantized)
    return (Piece(theirs=hf_name(config, name)),)


def _numbered_experts(name: str, shape: tuple[int, ...], *, quantized: bool) -> tuple[Piece, ...]:
    """Qwen3-MoE: a matrix an expert, mlp.experts.7.gate_proj.weight (transformers conversion_mapping)."""
    assert not quantized, "only GPT-OSS checkpoints hold MXFP4"
    prefix, _, kind = name.rpartition(".")
    if kind == "down_proj":
        return tuple(Piece(theirs=f"{prefix}.{e}.down_proj.weight", region=(e,)) for e in range(shape[0]))
    half = shape[1] // 2
    halves = {"gate_proj": slice(0, half), "up_proj": slice(half, shape[1])}
    return tuple(
        Piece(theirs=f"{prefix}.{e}.{part}.weight", region=(e, rows))
        for e in range(shape[0])
        for part, rows in halves.items()
    )


def _gpt_oss_experts(name: str, shape: tuple[int, ...], *, quantized: bool) -> tuple[Piece, ...]:
    """GPT-OSS: all experts in one tensor, gate and up rows alternating, matrices [in, out] unless they are MXFP4."""
    prefix, _, kind = name.rpartition(".")
    every = slice(None)
    theirs = {"gate_up_bias": "gate_up_proj_bias", "down_bias": "down_proj_bias"}.get(kind, kind)
    matrix = kind.endswith("proj")
    packed = {"theirs": f"{prefix}.{theirs}_blocks", "scales": f"{prefix}.{theirs}_scales"}
    where: dict[str, Any] = packed if matrix and quantized else {"theirs": f"{prefix}.{theirs}"}
    transposed = matrix and not quantized
    if kind.startswith("down"):
        return (Piece(**where, transposed=transposed),)
    half = shape[1] // 2

    def alternate(first: int) -> Index:
        rows = slice(first, None, 2)
        return (every, every, rows) if transposed else (every, rows)

    return (
        Piece(**where, region=(every, slice(0, half)), index=alternate(0), transposed=transposed),
        Piece(**where, region=(every, slice(half, 2 * half)), index=alternate(1), transposed=transposed),
    )


def hf_shapes(
    config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]], *, quantized: bool = False
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a checkpoint of these parameters holds."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        for piece in pieces(config, name, shape, quantized=quantized):
            if piece.scales is not None:
                *rows, columns = shape
                expected[piece.theirs] = (*rows, columns // 32, 16)
                expected[piece.scales] = (*rows, columns // 32)
            else:
                expected[piece.theirs] = _their_shape(piece, shape)
    return expected


def hf_tensors(model: nn.Module, *, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Weights under Hugging Face names: vocabulary trimmed, a tied head left out, adapters merged into theirs.

    Whole ones, made one at a time: of a sharded model all ranks must go through them together.

    Args:
        merged: False leaves adapters out: the weights that they stand beside.
    """
    config: DecoderConfig = model.config  # pyright: ignore[reportAssignmentType]
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():  # yields a tied tensor once, as the embedding
        owner, _, leaf = name.rpartition(".")
        if not is_native(config, name):
            continue
        tensor = full(parameter.detach())
        if merged and leaf == "weight" and getattr(modules[owner], "adapter", None) is not None:
            tensor = merged_weight(modules[owner])  # pyright: ignore[reportArgumentType]
        yield from to_hf(config, name, tensor)


def to_hf(config: DecoderConfig, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One parameter, or its gradient, as the tensors of a checkpoint; views where nothing is rearranged."""
    found = pieces(config, name, tuple(tensor.shape))
    if len({piece.theirs for piece in found}) == len(found):
        for piece in found:
            part = tensor[piece.region]
            yield piece.theirs, part.mT.contiguous() if piece.transposed else part
        return
    (theirs,) = {piece.theirs for piece in found}
    whole = tensor.new_empty(_their_shape(found[0], tuple(tensor.shape)))
    for piece in found:
        part = tensor[piece.region]
        whole[piece.index] = part.mT if piece.transposed else part
    yield theirs, whole


def is_quantized(hf_config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's config says that its experts are MXFP4."""
    quantization = hf_config.get("quantization_config") or {}
    return quantization.get("quant_method") == "mxfp4"


def _their_shape(piece: Piece, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the checkpoint tensor that `piece` of a parameter of `shape` belongs to."""
    if piece.index == ():
        part = torch.empty(shape, device="meta")[piece.region]
        return tuple(part.mT.shape if piece.transposed else part.shape)
    return (*shape[:-2], shape[-1], shape[-2]) if piece.transposed else shape


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
