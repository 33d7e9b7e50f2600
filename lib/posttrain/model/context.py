"""What ranks that share the tokens of a pack tell each other: keys and values of all tokens, and results of loss rows.

Everything else in a decoder is of one token and stays where the token is (data/context.py says where that is).
"""

import torch
from torch import Tensor

from posttrain.model.collectives import Group, reduce_out


def gather_tokens(x: Tensor, group: Group | None) -> Tensor:
    """What each rank has of its own tokens [T / n, ...] becomes [T, ...] of the whole pack, in the pack's order.

    The gradient of a rank's tokens is the sum of what all ranks found for them.
    """
    return x if group is None else _GatherTokens.apply(x, group)  # pyright: ignore[reportReturnType]


def spread(x: Tensor, index: Tensor, count: int, group: Group | None) -> Tensor:
    """Rows [M, ...] that stand at `index` [M] of all rows become [count, ...], each from the rank that has it.

    What is made of them must be the same on every rank: each takes its own rows' gradient from its own copy.
    """
    if group is None:
        return x
    whole = x.new_zeros(count, *x.shape[1:]).index_copy(0, index, x)
    return reduce_out(whole, group)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        ops, n = torch.ops._c10d_functional, group.size
        found = ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), n, group.name))
        heads, tails = found.view(n, 2, len(x) // 2, *x.shape[1:]).unbind(1)
        return torch.cat((heads.flatten(0, 1), tails.flip(0).flatten(0, 1)))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        group: Group = ctx.group
        ops, n, grad = torch.ops._c10d_functional, group.size, grads[0]
        heads, tails = grad.reshape(2, n, len(grad) // (2 * n), *grad.shape[1:]).unbind(0)
        parts = torch.stack((heads, tails.flip(0)), dim=1).flatten(0, 2)
        return ops.wait_tensor(ops.reduce_scatter_tensor(parts, "sum", n, group.name)), None
