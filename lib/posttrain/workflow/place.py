"""A decoder on a mesh: what model/parallel.py knows of it, handed to compute/shard.py, which knows no model."""

from collections.abc import Callable

import torch
from torch import nn

from posttrain.compute.mesh import Mesh
from posttrain.compute.shard import shard
from posttrain.model.decoder import Decoder
from posttrain.model.parallel import split


def place(
    model: Decoder,
    mesh: Mesh,
    *,
    prepare: Callable[[nn.Module], None] | None = None,
    compute_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> None:
    """Shard a decoder in place, adapters included; see shard(). What load_decoder's `place` is for."""
    shard(
        model,
        mesh,
        blocks=model.layers,
        split=lambda model, mesh: split(model, mesh.tensor),  # pyright: ignore[reportArgumentType]
        prepare=prepare,
        compute_dtype=compute_dtype,
        reshard_after_forward=reshard_after_forward,
    )
