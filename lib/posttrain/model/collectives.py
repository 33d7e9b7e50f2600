"""What ranks that share a model say to each other inside a forward and its backward; and sharded parameters as tensors.

Each function is the identity, in values and gradients, where the group is None. They are made of functional
collectives, which torch.compile traces, so a block compiles whole with its communication.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that speak to each other, and which of them this one is."""

    name: str
    """Of the process group."""
    size: int
    rank: int

    @staticmethod
    def of(mesh: DeviceMesh) -> "Group | None":
        """The group of a one-dimensional mesh; None for a mesh of one rank."""
        if mesh.size() == 1:
            return None
        return Group(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())

    def share(self, count: int) -> slice:
        """This rank's part of `count` things, in order: equal parts but for the last ranks', which may have fewer."""
        size = -(-count // self.size)
        return slice(min(self.rank * size, count), min((self.rank + 1) * size, count))


def copy_in(x: Tensor, group: Group | None) -> Tensor:
    """x, equal on all ranks, enters a region where each computes a part: its gradient is the sum over the ranks."""
    return x if group is None else _CopyIn.apply(x, group)  # pyright: ignore[reportReturnType]


def reduce_out(x: Tensor, group: Group | None) -> Tensor:
    """Parts leave such a region as their sum, equal on all ranks; each part's gradient is the sum's."""
    return x if group is None else _ReduceOut.apply(x, group)  # pyright: ignore[reportReturnType]


def shared(x: Tensor, group: Group | None) -> Tensor:
    """x, whose gradient all ranks of the group will find alike though it is summed over them: each gives its part."""
    return x if group is None else _Shared.apply(x, 1 / group.size)  # pyright: ignore[reportReturnType]


def gather_rows(x: Tensor, group: Group | None, count: int) -> Tensor:
    """Rows of Group.share(count) become all [count, ...] rows on every rank. What is made of them must be the same on
    every rank: the gradient of a rank's own rows is taken from its own copy."""
    return x if group is None else _GatherRows.apply(x, group, count)  # pyright: ignore[reportReturnType]


def all_to_all(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    """Send rows [sum(sent), ...] to the ranks in order, so many to each; the rows that came, in the ranks' order."""
    return _AllToAll.apply(x, sent, received, group)  # pyright: ignore[reportReturnType]


def local(parameter: Tensor, *, partial: bool = False) -> Tensor:
    """What this rank computes with: its part of a tensor-parallel parameter, else the parameter.

    Args:
        partial: the parameter is whole on every rank, and each finds a part of its gradient's sum.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=[Partial()] * parameter.device_mesh.ndim if partial else None)


def full(tensor: Tensor) -> Tensor:
    """A parameter whole, on every rank that takes part; of a sharded one all ranks must."""
    if not isinstance(tensor, DTensor):
        return tensor
    for dim in range(tensor.device_mesh.ndim):  # an axis at a time: torch warns of what it does itself in one call
        placements = [Replicate() if each <= dim else kept for each, kept in enumerate(tensor.placements)]
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, the same on every rank, into a parameter that may be sharded."""
    if isinstance(parameter, DTensor):  # src_data_rank None: cut locally, nothing is sent
        parameter.copy_(
            distribute_tensor(
                value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        )
    else:
        parameter.copy_(value)


def _sum(x: Tensor, group: Group) -> Tensor:
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group.name))


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return _sum(grads[0], ctx.group), None


class _ReduceOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0], None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0] * ctx.factor, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.route = sent, received, group
        return _exchange(x, sent, received, group)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        sent, received, group = ctx.route
        return _exchange(grads[0], received, sent, group), None, None, None


def _exchange(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_to_all_single(x.contiguous(), received, sent, group.name))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group, count: int) -> Tensor:
        ctx.rows = group.share(count)
        ops = torch.ops._c10d_functional
        padded = x.new_zeros(-(-count // group.size), *x.shape[1:])
        padded[: len(x)] = x
        return ops.wait_tensor(ops.all_gather_into_tensor(padded, group.size, group.name))[:count]

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0][ctx.rows], None, None
