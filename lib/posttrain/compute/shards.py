"""Which part of every tensor this rank holds, and which of them it writes into a checkpoint.

In: plain tensors (equal on all ranks) and DTensors of any mesh and placement. Out: Parts of the whole tensors in
row-major index space. Every element is written by exactly one rank; copies are dealt to the ranks that hold them,
so that all write about as many bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor: where it begins in every dimension, and its sizes."""

    at: tuple[int, ...]
    shape: tuple[int, ...]

    def common(self, other: "Part") -> "Part | None":
        """The box that both hold; None when there is none."""
        at = tuple(map(max, self.at, other.at))
        ends = (min(a + n, b + m) for a, n, b, m in zip(self.at, self.shape, other.at, other.shape, strict=True))
        shape = tuple(end - start for end, start in zip(ends, at, strict=True))
        return None if any(size <= 0 for size in shape) else Part(at, shape)

    def slices_in(self, outer: "Part") -> tuple[slice, ...]:
        """Index of this box in a tensor that holds `outer`."""
        return tuple(slice(a - b, a - b + n) for a, n, b in zip(self.at, self.shape, outer.at, strict=True))


def held(tensor: Tensor) -> tuple[Part, Tensor]:
    """The part of the whole tensor that this rank holds, and its local tensor."""
    if not isinstance(tensor, DTensor):
        return Part((0,) * tensor.ndim, tuple(tensor.shape)), tensor.detach()
    assert not any(placement.is_partial() for placement in tensor.placements), "a partial sum is no state"
    shape, at = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Part(tuple(at), tuple(shape)), tensor.to_local().detach()


def owned(tensors: Mapping[str, Tensor], *, rank: int, world_size: int) -> dict[str, tuple[Part, Tensor]]:
    """What `rank` writes: its share of the copies that it holds. Needs no communication, as every rank deals alike."""
    written = [0] * world_size
    found: dict[str, tuple[Part, Tensor]] = {}
    turns: dict[Any, int] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            mine = _is_mine(tensor, turns)
        else:
            least = written.index(min(written))
            written[least] += tensor.nbytes
            mine = least == rank
        if mine:
            part, local = held(tensor)
            if local.numel():
                found[name] = part, local
    return found


def _is_mine(tensor: DTensor, turns: dict[Any, int]) -> bool:
    """Of the ranks that hold equal copies one writes, a different one from tensor to tensor."""
    mesh = tensor.device_mesh
    where = mesh.get_coordinate()
    if where is None:  # this rank is not on the mesh
        return False
    copies = tuple(dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Replicate))
    turn = turns[mesh, copies] = turns.get((mesh, copies), -1) + 1
    for dim in copies:
        size = mesh.size(dim)
        if where[dim] != turn % size:
            return False
        turn //= size
    return True


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
