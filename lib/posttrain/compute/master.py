"""Float32 master weights beside bfloat16 parameters (mixed precision training, arXiv:1710.03740, section 3.1).

The model computes with bfloat16 parameters. Each has a float32 twin that gathers its gradients, that the optimizer
steps on, and whose rounding the parameter becomes afterwards: a small update is not lost, and micro-batches add up
in float32. 18 bytes a parameter with AdamW: 2 + 4 + 4 for the gradient + 8 for the moments.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from posttrain.compute.sum_kernels import gather, serves


class Masters:
    """The twins of a model's trainable parameters. Make it from float32 parameters: they become the twins."""

    def __init__(self, model: nn.Module):
        """Turn every parameter of `model` into bfloat16; those that are trained keep their float32 values here."""
        self._twins: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in model.parameters():
            if parameter.requires_grad:
                self._twins[parameter] = nn.Parameter(parameter.data)
                parameter.register_post_accumulate_grad_hook(self._take_gradient)
            parameter.data = parameter.data.to(torch.bfloat16)

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """The float32 twin of a parameter, or the parameter itself when it is not trained."""
        return self._twins.get(parameter, parameter)

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self._twins.values())

    @torch.no_grad()
    def publish(self) -> None:
        """Round the twins into the model's parameters."""
        torch._foreach_copy_(list(self._twins), list(self._twins.values()))

    def _take_gradient(self, parameter: Tensor) -> None:
        """Move a parameter's gradient to its twin as soon as it is whole, so that only one at a time is held twice."""
        twin, gradient = self._twins[parameter], parameter.grad  # pyright: ignore[reportArgumentType]
        assert gradient is not None, "the hook runs once a gradient is there"
        if serves(gradient):
            first = twin.grad is None
            total = torch.empty_like(gradient, dtype=twin.dtype) if twin.grad is None else twin.grad
            gather(_local(total), _local(gradient), first=first)
            twin.grad = total
        elif twin.grad is None:
            twin.grad = gradient.to(twin.dtype)
        else:
            twin.grad += gradient
        parameter.grad = None


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
