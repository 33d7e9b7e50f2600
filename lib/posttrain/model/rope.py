"""Rotary positions: a config's `rope_parameters` become frequencies, and positions become cos and sin tables."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding of one kind of layer (RoFormer, arXiv:2104.09864), its scaling already worked in."""

    frequencies: tuple[float, ...]
    """[head_dim / 2] float32 values, radians a token."""
    attention_factor: float = 1.0
    """On cos and sin; above 1 with YaRN, which so raises the temperature of attention."""


def rope_of(parameters: Mapping[str, Any], *, head_dim: int, max_length: int) -> Rope:
    """Read one `rope_parameters` of a Hugging Face config (transformers modeling_rope_utils).

    Raises:
        ModelError: a kind of scaling that is not defined here.
    """
    kind = parameters.get("rope_type", "default")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("rope_parameters.partial_rotary_factor is not 1; the decoder turns whole heads")
    theta = parameters["rope_theta"]
    base = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim))
    match kind:
        case "default":
            scaled, factor = base, 1.0
        case "linear":
            scaled, factor = base / parameters["factor"], 1.0
        case "llama3":
            scaled, factor = _llama3(base, parameters), 1.0
        case "yarn":
            scaled, factor = _yarn(base, parameters, max_length=max_length)
        case _:
            raise ModelError(f"rope_type {kind!r} is not defined; defined: default, linear, llama3, yarn")
    return Rope(frequencies=tuple(scaled.tolist()), attention_factor=factor)


def rope_tables(rope: Rope, position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos [T, 1, 1, head_dim / 2] and -sin, sin [T, 1, 2, head_dim / 2], float32, of positions [T]: see rotate().

    Args:
        frequencies: rope.frequencies as [head_dim / 2] float32 on the positions' device.
    """
    angles = position_ids.float()[:, None, None, None] * frequencies
    cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
    return cos, torch.cat((-sin, sin), dim=-2)


def rotate(x: Tensor, cos: Tensor, sins: Tensor) -> Tensor:
    """Turn [T, H, head_dim]; the two halves of a head are the coordinates (GPT-NeoX layout).

    Args:
        cos, sins: of rope_tables(), in the dtype of `x`.
    """
    # Flipped, not joined from halves: a compiler makes that, and its gradient, a part of the norm's kernel.
    halves = x.unflatten(-1, (2, -1))
    return (halves * cos + halves.flip(-2) * sins).flatten(-2)


def _llama3(base: Tensor, parameters: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    factor, context = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = context * base / (2 * math.pi)
    """Of each frequency within the first context."""
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * base / factor + smooth * base


def _yarn(base: Tensor, parameters: Mapping[str, Any], *, max_length: int) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071, eq. 20 to 23): a ramp over dimensions from kept to interpolated frequencies."""
    context = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or max_length / context
    half, theta = len(base), parameters["rope_theta"]

    def dimension(turns: float) -> float:
        """Where a frequency makes `turns` turns within the first context."""
        return half * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

    first, last = dimension(parameters.get("beta_fast") or 32), dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    width = (last - first) or 0.001  # transformers' own guard: a ramp of no width is a step
    ramp = ((torch.arange(half, dtype=torch.float32, device="cpu") - first) / width).clamp(0, 1)
    scale = parameters.get("attention_factor")
    if scale is None:
        over, under = parameters.get("mscale"), parameters.get("mscale_all_dim")
        scale = _mscale(factor, over) / _mscale(factor, under) if over and under else _mscale(factor, 1.0)
    return base / factor * ramp + base * (1 - ramp), float(scale)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
