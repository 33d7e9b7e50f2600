"""Policy weights reach the generator, and are proved to have arrived: the one arrow that runs back."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, shapes, dtypes and bytes of named tensors, in their order."""
    total = hashlib.sha256()
    for name, tensor in weights:
        held = tensor.detach().cpu().contiguous()
        total.update(f"{name} {tuple(held.shape)} {held.dtype}\n".encode())
        total.update(held.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
