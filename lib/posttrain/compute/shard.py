"""A model on the meta device becomes one whose parameters lie sharded over a mesh, in the one order that works.

LoRA comes before (adapters are parameters of blocks); then the model's own split (tensor, expert and context
parallelism), activation checkpointing and compiling, and last FSDP2 (`fully_shard`), which wraps what it finds.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from posttrain.compute.mesh import Mesh


def shard(
    model: nn.Module,
    mesh: Mesh,
    *,
    blocks: Iterable[nn.Module],
    experts: Iterable[nn.Module] = (),
    split: Callable[[nn.Module, Mesh], None] | None = None,
    prepare: Callable[[nn.Module], None] | None = None,
    compute_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> None:
    """Shard every parameter in place; a model on one rank stays as it is, without a wrapper.

    Gradients become sums over the ranks, never means, reduced in float32: the loss is divided by the global count.
    Parameters keep their dtype, and with it the optimizer; forward and backward see them in `compute_dtype`.

    Args:
        blocks: each gathered by itself, for its forward and again for its backward.
        experts: modules inside blocks whose parameters differ from one rank of an expert group to the next.
        split: makes parameters DTensors over mesh.tensor or mesh.expert and tells modules whom to speak to.
        prepare: activation checkpointing and compiling of blocks.
        compute_dtype: None computes in the parameters' own.
        reshard_after_forward: off keeps gathered blocks until their backward: more memory, one gather less.
    """
    if mesh.sizes.world > 1 and split is not None:
        split(model, mesh)
    if prepare is not None:
        prepare(model)
    if mesh.sizes.world == 1:
        return
    precision = MixedPrecisionPolicy(
        # Inputs are cast where they are made: this would cast the tables of positions and the columns of a batch too.
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )

    def wrap(module: nn.Module, over: DeviceMesh, *, reshard: bool) -> None:
        fully_shard(module, mesh=over, mp_policy=precision, reshard_after_forward=reshard)

    for module in experts:
        wrap(module, mesh.experts, reshard=reshard_after_forward)
    for block in blocks:
        wrap(block, mesh.blocks, reshard=reshard_after_forward)
    wrap(model, mesh.all, reshard=False)  # its head is used after the forward, and right after it the backward begins
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
