"""Weights go from policy ranks to engines a bucket at a time, on the device, without passing through host memory.

A bucket is a flat buffer of bytes that whole tensors are laid into. It reaches an engine in one of two ways: by
broadcast in a process group of rank 0 and all engine workers (NCCL between GPUs, gloo between CPUs), or, where the two
processes share a GPU, as a CUDA IPC handle that the engine maps into its memory once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from posttrain.compute.collective import MeetingPoint, meet
from posttrain.compute.weight_sync import Part, digest

BUCKET_BYTES = 256 << 20
"""Or the largest tensor, if that is more."""

ALIGN = 16
"""Bytes; a tensor begins at a multiple."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A tensor in a bucket."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    """Of its bytes in the bucket."""

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.start + torch.Size(self.shape).numel() * self.dtype.itemsize


def unpack(bucket: Tensor, packed: Iterable[Packed]) -> list[tuple[str, Tensor]]:
    """The tensors in a bucket, as views of it."""
    return [(each.name, bucket[each.start : each.end].view(each.dtype).view(each.shape)) for each in packed]


class Sender:
    """One policy rank's side: goes through its weights once for each sync, a bucket at a time.

    All ranks of a sharded policy go through them together; rank 0 sends, or each rank to the engine on its own GPU.

    Args:
        weights: (part) -> whole tensors under Hugging Face names, adapters' under PEFT's, one at a time.
        largest: elements of the largest.
    """

    def __init__(self, device: torch.device, weights: Callable[[Part], Iterable[tuple[str, Tensor]]], *, largest: int):
        self.device, self.weights, self.largest = device, weights, largest
        self.group: Any = None
        self._bucket: Tensor | None = None
        self._left: Iterator[tuple[str, Tensor]] = iter(())
        self._next: tuple[str, Tensor] | None = None
        self._used = 0

    def tensors(self, dtype: str, part: Part = "merged") -> Iterator[tuple[str, Tensor]]:
        """What start() sends, a tensor at a time."""
        wanted = getattr(torch, dtype)
        return ((name, tensor.to(wanted)) for name, tensor in self.weights(part))

    def start(self, dtype: str, part: Part = "merged") -> None:
        """Begin with the first tensor; all are cast to `dtype`."""
        self._left = self.tensors(dtype, part)
        self._next = next(self._left, None)

    def fill(self) -> list[Packed]:
        """Lay as many tensors into the bucket as it holds; none when all have been sent."""
        bucket, packed, end = self._room(), [], 0
        while self._next is not None:
            name, tensor = self._next
            start = -(-end // ALIGN) * ALIGN
            one = Packed(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype, start=start)
            if one.end > bucket.numel():
                assert packed, f"{name} is larger than the bucket of {bucket.numel()} bytes"
                break
            unpack(bucket, [one])[0][1].copy_(tensor)
            packed.append(one)
            end = one.end
            self._next = next(self._left, None)
        self._used = end
        _synchronize(self.device)  # another process reads it next
        return packed

    def digest(self, dtype: str, part: Part = "merged") -> str:
        """digest() of what start() sends, on the device."""
        return digest(self.tensors(dtype, part))

    def meet(self, host: str) -> str:
        """An address on `host` at which join() will wait for the engines' workers."""
        self._meeting = MeetingPoint(host)
        return self._meeting.address

    def join(self, world_size: int, timeout_s: float) -> None:
        """Meet the engines' workers, as rank 0 of a group of all."""
        where = {"rank": 0, "world_size": world_size, "timeout_s": timeout_s, "device": self.device}
        self.group = transfer_group(self._meeting, **where)

    def send(self) -> None:
        """Broadcast what fill() laid into the bucket."""
        _broadcast(self.group, self._room()[: self._used], self.device)

    def gpu(self) -> str:
        """See gpu_id()."""
        return gpu_id()

    def handle(self) -> tuple[Any, ...]:
        """What another process maps the bucket by, on the same GPU (CUDA IPC)."""
        from torch.multiprocessing.reductions import reduce_tensor

        _, arguments = reduce_tensor(self._room())
        return arguments

    def _room(self) -> Tensor:
        if self._bucket is None:
            size = max(BUCKET_BYTES, 4 * self.largest)  # no dtype of weights is wider
            self._bucket = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self._bucket


class Receiver:
    """One engine worker's side."""

    def __init__(self, device: torch.device):
        self.device = device
        self.group: Any = None
        self._bucket: Tensor | None = None
        self._mapped: tuple[bytes, Tensor] | None = None

    def join(self, address: str, *, rank: int, world_size: int, timeout_s: float) -> None:
        """Meet the policy's rank 0 at its address."""
        self.group = transfer_group(address, rank=rank, world_size=world_size, timeout_s=timeout_s, device=self.device)

    def receive(self, packed: Sequence[Packed]) -> list[tuple[str, Tensor]]:
        """The tensors of the bucket that rank 0 broadcasts now; views, until the next."""
        size = packed[-1].end
        if self._bucket is None or self._bucket.numel() < size:
            self._bucket = torch.empty(max(BUCKET_BYTES, size), dtype=torch.uint8, device=self.device)
        _broadcast(self.group, self._bucket[:size], self.device)
        return unpack(self._bucket, packed)

    def map(self, handle: tuple[Any, ...], packed: Sequence[Packed]) -> list[tuple[str, Tensor]]:
        """The tensors of the bucket behind a handle of a process on the same GPU; views, until it is filled again."""
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        key = bytes(handle[7])
        if self._mapped is None or self._mapped[0] != key:
            index = torch.cuda.current_device()  # the same GPU may have another number in the process that shares it
            self._mapped = (key, rebuild_cuda_tensor(*handle[:6], index, *handle[7:]))  # pyright: ignore[reportCallIssue]
        return unpack(self._mapped[1], packed)

    def done(self) -> None:
        """Wait until what was read from the bucket has been copied: it may be filled again."""
        _synchronize(self.device)


def transfer_group(
    meeting: MeetingPoint | str, *, rank: int, world_size: int, timeout_s: float, device: torch.device
) -> Any:
    """A process group of its own beside a process's default one, which policy ranks have and engine workers may have.

    Args:
        meeting: on rank 0 the MeetingPoint itself, elsewhere its address.
    """
    timeout = timedelta(seconds=timeout_s)
    store = meet(meeting, rank=rank, world_size=world_size, timeout=timeout)
    if device.type != "cuda":
        return dist.ProcessGroupGloo(store, rank, world_size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, world_size, options)


def gpu_id() -> str:
    """Which GPU this process computes on, whatever number it has here."""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def _broadcast(group: Any, bucket: Tensor, device: torch.device) -> None:
    group.broadcast(bucket, 0).wait()
    _synchronize(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
