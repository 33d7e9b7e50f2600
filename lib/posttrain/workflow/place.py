"""A decoder on a mesh: what model/parallel.py knows of it, handed to compute/shard.py, which knows no model."""

from collections.abc import Callable

import torch
from torch import nn

from posttrain.compute.mesh import Mesh
from posttrain.compute.shard import shard
from posttrain.errors import ModelError
from posttrain.model.decoder import Decoder
from posttrain.model.lora import adapters
from posttrain.model.parallel import expert_modules, share_tokens, split, split_experts, unfit


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
    if problems := unfit(model.config, tensor=mesh.sizes.tensor, expert=mesh.sizes.expert, dora=dora):
        raise ModelError("\n".join(problems))

    def split_decoder(_: nn.Module, mesh: Mesh) -> None:
        split(model, mesh.tensor)
        split_experts(model, mesh.expert)
        share_tokens(model, mesh.context)

    shard(
        model,
        mesh,
        blocks=model.layers,
        experts=expert_modules(model) if mesh.sizes.expert > 1 else (),
        split=split_decoder,
        prepare=prepare,
        compute_dtype=compute_dtype,
        reshard_after_forward=reshard_after_forward,
    )
