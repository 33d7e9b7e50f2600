"""Sums over the ranks of one training job, and the norm of a gradient. With one rank nothing is sent."""

import os
import socket
import sys
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


class MeetingPoint:
    """A listening socket on rank 0, on one address and not on all of the machine's, held until the ranks meet."""

    def __init__(self, host: str):
        self.listener = socket.create_server((host, 0))
        self.address = f"{host}:{self.listener.getsockname()[1]}"


class Ranks:
    """The process group of the policy ranks: gloo on CPU, NCCL on GPUs.

    A collective that a peer never joins fails after `timeout_s`.
    """

    def __init__(
        self, *, rank: int, world_size: int, meeting: "MeetingPoint | str", timeout_s: float, device: torch.device
    ):
        """
        Args:
            meeting: on rank 0 the MeetingPoint itself, elsewhere its address.
        """
        self.rank, self.world_size, self.device = rank, world_size, device
        if world_size == 1:
            return
        timeout = timedelta(seconds=timeout_s)
        address = meeting if isinstance(meeting, str) else meeting.address
        if address.startswith("127."):
            os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
        store = meet(meeting, rank=rank, world_size=world_size, timeout=timeout)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum of float64 numbers over the ranks."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradient of all that is trained by its sum over the ranks, in one message; an absent one is zero.

        A sum, not a mean: the loss is already divided by the global token count. A sharded parameter's gradient is
        that sum already: FSDP2 makes it in the backward (compute/shard.py).
        """
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
        if self.world_size == 1 or not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def close(self) -> None:
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def meet(meeting: "MeetingPoint | str", *, rank: int, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """The store at which the processes of a group find each other; rank 0 has it, on the port that it listens on.

    Args:
        meeting: on rank 0 the MeetingPoint itself, elsewhere its address.
    """
    host, port = (meeting if isinstance(meeting, str) else meeting.address).rsplit(":", 1)
    return dist.TCPStore(
        host,
        int(port),
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=None if isinstance(meeting, str) else meeting.listener.detach(),
        use_libuv=False,
    )


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to a global norm of `max_norm`, in place; the norm they had, a scalar on their device.

    Right for whole tensors and for DTensors of any mesh, side by side: each element counts once. The ranks call it
    together where any is sharded, and all get the same number; the host does not wait for it.
    """
    by_axes: dict[tuple[tuple[DeviceMesh, int], ...], list[Tensor]] = {}
    gradients: list[Tensor] = []
    for gradient in (parameter.grad for parameter in parameters):
        if gradient is None:
            continue
        axes, held = (), gradient
        if isinstance(gradient, DTensor):
            assert not any(p.is_partial() for p in gradient.placements), "a gradient that is not summed has no norm"
            placements = enumerate(gradient.placements)
            axes = tuple((gradient.device_mesh, dim) for dim, p in placements if not p.is_replicate())
            held = gradient.to_local()
        by_axes.setdefault(axes, []).append(held)
        gradients.append(held)
    norms = []
    for axes, held in by_axes.items():
        norm = nn.utils.get_total_norm(held)
        if axes:
            norm = norm.square()
            for mesh, dim in axes:
                dist.all_reduce(norm, group=mesh.get_group(dim))
            norm = norm.sqrt()
        norms.append(norm)
    total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)  # torch.nn.utils.clip_grad_norm_'s own guard
    torch._foreach_mul_(gradients, factor)
    return total
