"""A decoder on a mesh: what model/parallel.py knows of it, handed to compute/shard.py, which knows no model."""

from collections.abc import Callable

import torch
from torch import nn

from posttrain.compute.mesh import Mesh
from posttrain.compute.shard import shard
from posttrain.errors import ModelError
from posttrain.model.decoder import Decoder
from posttrain.model.lora import adapters
from posttrain.model.parallel import split, unfit


def place(
    model: Decoder,
    mesh: Mesh,
    *,
    prepare: Callable[[nn.Module], None] | None = None,
    compute_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> None:
    """Shard a decoder in place, adapters included; see shard(). What load_decoder's `place` is for.

    Raises:
        ModelError: the model cannot be split so.
    """
    dora = any(adapter.magnitude is not None for _, _, adapter in adapters(model))
    if problems := unfit(model.config, tensor=mesh.sizes.tensor, dora=dora):
        raise ModelError("\n".join(problems))
    assert mesh.sizes.context == mesh.sizes.expert == 1, "the decoder is split over data and tensor ranks only"
    shard(
        model,
        mesh,
        blocks=model.layers,
        split=lambda model, mesh: split(model, mesh.tensor),  # pyright: ignore[reportArgumentType]
        prepare=prepare,
        compute_dtype=compute_dtype,
        reshard_after_forward=reshard_after_forward,
    )
