"""Sums over the ranks of one training job. With one rank nothing is sent."""

from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The process group of the policy ranks: gloo on CPU, NCCL on GPUs.

    A collective that a peer never joins fails after `timeout_s`.
    """

    def __init__(self, *, rank: int, world_size: int, address: str, timeout_s: float, device: torch.device):
        self.rank, self.world_size, self.device = rank, world_size, device
        if world_size > 1:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                init_method=f"tcp://{address}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_s),
            )

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum of float64 numbers over the ranks."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over the ranks, in one message; an absent gradient counts as zero.

        A sum, not a mean: the loss is already divided by the global token count.
        """
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world_size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def close(self) -> None:
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
