"""What runs inside vLLM's worker processes: it loads weights, and tells what the worker holds of them.

vLLM fuses q, k and v, gate and up, stacks experts, pads the vocabulary, and splits matrices over tensor-parallel
workers; adapters lie in its buffers for those (vllm_adapters.py). Here every tensor that was sent is found again in
that: the fingerprint of the part that this worker holds goes back under the tensor's name, and the parts of all workers
add up to what was sent. A layout in which a tensor cannot be found is refused, never assumed to be right.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.compute.generator.vllm_adapters import bare, slots, take
from posttrain.compute.weight_sync import WRAP, Held, adapter_part, fingerprint
from posttrain.compute.weight_transfer import Packed, Receiver
from posttrain.errors import SyncError


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one worker holds of one tensor of a checkpoint."""

    tensor: Tensor
    row: int = 0
    column: int = 0
    """Place of its first element in the whole tensor."""
    counts: bool = True
    """False where another worker answers for the same elements."""


class WeightsWorker:
    """Methods that vLLM adds to its worker class (`worker_extension_cls`); names start with posttrain_ to be unique."""

    def posttrain_load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy whole tensors, under Hugging Face names, into the model; it takes its own share of each.

        Those of adapters are kept until posttrain_adapt(), which has to see them all.
        """
        plain = []
        for name, tensor in weights:
            if adapter_part(name) is None:
                plain.append((name, tensor))
            else:  # the bucket that it lies in is filled again
                _waiting(self)[name] = tensor.to(self.device, copy=True)  # pyright: ignore[reportAttributeAccessIssue]
        if plain:
            self.posttrain_complete = True
            with torch.no_grad(), bare(_model(self)):
                _model(self).load_weights(iter(plain))  # pyright: ignore[reportCallIssue]

    def posttrain_adapt(self) -> None:
        """Sample with the adapters that came since the last call.

        Raises:
            SyncError: no weights ever came.
        """
        if not getattr(self, "posttrain_complete", False):
            raise SyncError("adapters came without the weights that they stand beside")
        if waiting := _waiting(self):
            take(self.model_runner.lora_manager._adapter_manager, waiting)  # pyright: ignore[reportAttributeAccessIssue]
            waiting.clear()

    def posttrain_join(self, address: str, *, first_rank: int, world_size: int, timeout_s: float) -> None:
        """Meet the policy's rank 0; workers of this engine are ranks from `first_rank` on."""
        _receiver(self).join(address, rank=first_rank + _rank(self), world_size=world_size, timeout_s=timeout_s)

    def posttrain_bucket(self, packed: Sequence[Packed], handle: tuple[Any, ...] | None) -> None:
        """Load what a bucket holds: one that is broadcast now, or that `handle` maps."""
        receiver = _receiver(self)
        self.posttrain_load(receiver.receive(packed) if handle is None else receiver.map(handle, packed))
        receiver.done()

    def posttrain_held(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Held]:
        """This worker's parts of the named tensors; `shapes` are those of the whole.

        Raises:
            SyncError: a tensor cannot be found in vLLM's layout, or vLLM holds a parameter that none of them fills.
        """
        return held_of(_model(self), shapes, rank=_rank(self))


def held_of(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], *, rank: int = 0) -> list[Held]:
    """See WeightsWorker.posttrain_held()."""
    with bare(model) as wrapped:
        layout = Layout(model, shapes, rank=rank, wrapped=wrapped)
        parts = {name: layout.part(name) for name in shapes}
    if any(adapter_part(name) is None for name in shapes):
        layout.check_all_filled()
    layout.check_slots({name: part.tensor for name, part in parts.items() if adapter_part(name)})
    marks = [fingerprint(p.tensor, row=p.row, column=p.column) if p.counts else 0 for p in parts.values()]
    return [
        Held(name=name, shape=shapes[name], dtype=part.tensor.dtype, fingerprint=int(mark) % WRAP)
        for (name, part), mark in zip(parts.items(), marks, strict=True)
    ]


class Layout:
    """Where the tensors of a checkpoint lie in a model of vLLM's, on one tensor-parallel worker."""

    def __init__(
        self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]], *, rank: int, wrapped: Mapping[str, Any]
    ):
        self.model, self.shapes, self.rank, self.wrapped = model, shapes, rank, wrapped
        self.parameters = dict(model.named_parameters())
        self.fused: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
        self.filled: dict[str, int] = dict.fromkeys(self.parameters, 0)

    def part(self, name: str) -> Part:
        """What is held of the tensor `name`.

        Raises:
            SyncError: it cannot be told.
        """
        if (adapter := adapter_part(name)) is not None:
            return self._adapter(name, *adapter)
        if ".experts." in name:
            return self._expert(name)
        theirs, place = self._where(name, self.parameters)
        if theirs is None:
            raise self._lost(name, "has no parameter of that name, nor one that fuses it with others")
        held = self.parameters[theirs]
        if place is not None:  # of several matrices, or biases, that lie below each other
            sizes = self._module(theirs).output_partition_sizes
            held = held.narrow(0, sum(sizes[:place]), sizes[place])
        self.filled[theirs] += held.numel()
        return self._found(name, theirs, held, piece=place)

    def _where(self, name: str, theirs: Iterable[str]) -> tuple[str | None, int | None]:
        """Which of vLLM's names stands for `name`, and at which place of several where it is fused with others."""
        if name in theirs:
            return name, None
        for fused, pieces in self.fused.items():
            for place, piece in enumerate(pieces):
                found = f"{name}.".replace(f".{piece}.", f".{fused}.").removesuffix(".")
                if found != name and found in theirs:
                    return found, place
        return None, None

    def _adapter(self, name: str, module: str, matrix: str) -> Part:
        """A matrix of an adapter: each worker has what its part of the module's weight needs."""
        theirs, place = self._where(module, self.wrapped)
        pieces = [] if theirs is None else slots(self.wrapped[theirs], matrix)
        if theirs is None or len(pieces) <= (place or 0):
            raise self._lost(name, "has no adapter of that module")
        held = pieces[place or 0]
        held = held[: self.shapes[name][0]] if matrix == "A" else held[:, : self.shapes[name][1]]  # its rank; 0 beyond
        return self._found(name, f"{theirs}.weight", held, piece=place)

    def check_slots(self, parts: Mapping[str, Tensor]) -> None:
        """
        Raises:
            SyncError: adapters hold more than the parts that were sent.
        """
        every = [slot for module in self.wrapped.values() for matrix in "AB" for slot in slots(module, matrix)]
        if parts and (more := _nonzero(every) - _nonzero(parts.values())):
            raise SyncError(f"vllm holds {more} elements of adapters that no tensor of the policy fills")

    def check_all_filled(self) -> None:
        """
        Raises:
            SyncError: a parameter, or a part of one, is in no tensor of the checkpoint.
        """
        for name, count in self.filled.items():
            missing = self.parameters[name].numel() - count
            if missing:
                raise SyncError(f"vllm holds {missing} elements of {name} that no tensor of the policy fills")

    def _found(self, name: str, theirs: str, held: Tensor, *, piece: int | None) -> Part:
        """`held` is what this worker has of the tensor `name`, by rows or by columns, or all of it."""
        module, shape = self._module(theirs), self.shapes[name]
        if (indices := getattr(module, "shard_indices", None)) is not None:  # a vocabulary, padded
            row, end = indices.org_vocab_start_index, indices.org_vocab_end_index
            return self._checked(name, Part(tensor=held[: end - row], row=row), (end - row, *shape[1:]))
        if tuple(held.shape) == shape:  # a copy on every worker: the first answers
            return Part(tensor=held, counts=self.rank == 0)
        if held.shape[1:] == shape[1:] and held.shape[0]:
            copies = getattr(module, "num_kv_head_replicas", 1) if piece else 1  # of k and v, not of q
            row = self.rank // copies * held.shape[0]
            return self._checked(name, Part(tensor=held, row=row, counts=self.rank % copies == 0), tuple(held.shape))
        if held.ndim == 2 and held.shape[0] == shape[0] and hasattr(module, "input_size_per_partition"):
            part = Part(tensor=held, column=self.rank * module.input_size_per_partition)
            return self._checked(name, part, (shape[0], module.input_size_per_partition))
        raise self._lost(name, f"keeps it as {tuple(held.shape)}")

    def _expert(self, name: str) -> Part:
        """A matrix of one expert among those stacked: w13 is gate above up, w2 is down; whole on one worker only."""
        prefix, _, rest = name.partition(".experts.")
        number, kind = rest.split(".")[:2]
        leaf = "w2_weight" if kind == "down_proj" else "w13_weight"
        found = [key for key in self.parameters if key.startswith(f"{prefix}.experts.") and key.endswith(leaf)]
        if len(found) != 1 or kind not in ("gate_proj", "up_proj", "down_proj"):
            raise self._lost(name, "stacks experts in another way")
        held = self.parameters[found[0]][int(number)]
        if kind != "down_proj":
            half = held.shape[0] // 2
            held = held[:half] if kind == "gate_proj" else held[half:]
        self.filled[found[0]] += held.numel()
        return self._checked(name, Part(tensor=held), self.shapes[name])

    def _checked(self, name: str, part: Part, shape: tuple[int, ...]) -> Part:
        if tuple(part.tensor.shape) != shape:
            raise self._lost(name, f"keeps it as {tuple(part.tensor.shape)}")
        return part

    def _module(self, parameter: str) -> Any:
        return self.model.get_submodule(parameter.rpartition(".")[0])

    def _lost(self, name: str, why: str) -> SyncError:
        return SyncError(
            f"{name} {self.shapes[name]} cannot be read back from vllm, which {why}; unproved weights are not sampled "
            "from. Fix: rollout.generator: transformers"
        )


def _nonzero(tensors: Iterable[Tensor]) -> int:
    return int(sum(tensor.count_nonzero() for tensor in tensors))


def _waiting(worker: Any) -> dict[str, Tensor]:
    """Tensors of adapters, on the way."""
    if getattr(worker, "posttrain_waiting", None) is None:
        worker.posttrain_waiting = {}
    return worker.posttrain_waiting


def _model(worker: Any) -> nn.Module:
    return worker.get_model()


def _receiver(worker: Any) -> Receiver:
    if getattr(worker, "posttrain_receiver", None) is None:
        worker.posttrain_receiver = Receiver(torch.device(worker.device))
    return worker.posttrain_receiver


def _rank(worker: Any) -> int:
    return worker.rank
