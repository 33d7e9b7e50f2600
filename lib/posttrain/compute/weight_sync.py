"""Policy weights reach the generator, and are proved to have arrived: the one arrow that runs back.

The proof is exact and cheap where the weights are: a fingerprint of every tensor, taken on its own device, of which
only eight bytes travel. Fingerprints of parts add up to that of the whole, so a generator that keeps a matrix fused
with others, padded, or split over devices answers with the same digest as the policy that sent it whole.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
"""Bytes of an element -> the integers that its bits are read as."""

CHUNK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Elements widened to 64 bits at once: half a megabyte stays in a core's cache, a GPU wants more at a time."""

WRAP = 1 << 64

Part = Literal["merged", "whole", "adapters"]
"""What is sent of a policy: its weights, adapters merged into theirs; the weights that stand still and adapters beside
them; the adapters alone, to who holds the rest."""

ADAPTER_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
"""PEFT's name of a tensor: the adapted module, and A [rank, in] or B [out, rank], which brings the scaling with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One tensor as its holder knows it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fingerprint: int


def digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Of names, shapes, dtypes and bits of named tensors, in their order; the same on any device.

    Whatever differs in one element differs for certain; for any other difference the chance to go unseen is that of a
    64-bit hash. It is no protection from someone who looks for a collision.
    """
    named = [(name, tuple(tensor.shape), tensor.dtype, fingerprint(tensor)) for name, tensor in weights]
    return digest_of(
        Held(name=name, shape=shape, dtype=dtype, fingerprint=int(found) % WRAP)  # read once all are under way
        for name, shape, dtype, found in named
    )


def digest_of(held: Iterable[Held]) -> str:
    """digest() of tensors whose fingerprints are known, in their order."""
    total = hashlib.sha256()
    for each in held:
        total.update(f"{each.name} {each.shape} {each.dtype} {each.fingerprint:016x}\n".encode())
    return total.hexdigest()


def adapter_part(name: str) -> tuple[str, str] | None:
    """Of an adapter's tensor the module and "A" or "B"; None of a weight."""
    found = ADAPTER_NAME.fullmatch(name)
    return None if found is None else (found[1], found[2])


@torch.no_grad()
def fingerprint(tensor: Tensor, *, row: int = 0, column: int = 0) -> Tensor:
    """[] int64 on the tensor's device: sum over its elements of their bits times an odd number of their place.

    In arithmetic modulo 2^64, so the order of summation does not matter.

    Args:
        tensor: [rows, ...], float of at most 4 bytes; what follows the first dimension is counted as columns.
        row, column: place of its first element, where it is a part of a larger matrix.
    """
    rows = tensor.shape[0] if tensor.ndim else 1
    bits = tensor.detach().view(INTEGERS[tensor.element_size()]).reshape(rows, -1)
    columns = bits.shape[1]
    by_row = _odd(row + rows, 1).to(tensor.device)[row:]
    by_column = _odd(column + columns, 2).to(tensor.device)[column:]
    step = max(CHUNK_ELEMENTS[tensor.device.type] // max(columns, 1), 1)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, rows, step):
        part = (bits[start : start + step].long() * by_column).sum(1)
        total += (part * by_row[start : start + step]).sum()
    return total


@lru_cache(maxsize=64)
def _odd(count: int, salt: int) -> Tensor:
    """[count] odd int64, spread like random ones: the finalizer of SplitMix64 (Steele et al. 2014) of the place."""
    place = np.arange(count, dtype=np.uint64) + np.uint64(salt << 40)
    mixed = place * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return torch.from_numpy((mixed | np.uint64(1)).view(np.int64))
