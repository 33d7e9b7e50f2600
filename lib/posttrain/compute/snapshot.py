"""One rank's side of a save: training stops for a copy to host memory, and a thread writes that copy.

The copy's memory is kept from save to save, pinned where the state is on a GPU.
"""

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from posttrain import faults, storage
from posttrain.compute.shard_file import write_shard
from posttrain.compute.shards import Part, owned
from posttrain.errors import PosttrainError, StorageError


class Snapshot:
    """What this rank writes, taken by begin() and reported by result(), one save at a time."""

    def __init__(self, *, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size
        self._host: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._outcome: dict[str, Any] = {}

    def begin(self, tensors: Mapping[str, Tensor], folder: str) -> None:
        """Copy this rank's share of `tensors`, then write it into `folder` in a thread."""
        assert self._thread is None, "the last save has not been asked for its result"
        parts = self._copied(owned(tensors, rank=self.rank, world_size=self.world_size))
        faults.point("checkpoint.after_snapshot", self.rank)
        self._outcome = {}
        self._thread = threading.Thread(target=self._write, args=(folder, parts), name="checkpoint", daemon=True)
        self._thread.start()

    def result(self) -> dict[str, Any] | None:
        """None while the thread writes; then once what it did: {"report": …} or {"failed": message}.

        A failure of storage is an outcome, as training may go on; any other error of the thread is raised here.
        """
        thread = self._thread
        if thread is None:
            return {"failed": "no save was begun"}
        thread.join(timeout=0.01)
        if thread.is_alive():
            return None
        self._thread = None
        if "raised" in self._outcome:
            raise self._outcome["raised"]
        return self._outcome

    def _copied(self, parts: Mapping[str, tuple[Part, Tensor]]) -> dict[str, tuple[Part, Tensor]]:
        found: dict[str, tuple[Part, Tensor]] = {}
        pinned = any(local.is_cuda for _, local in parts.values())
        for name, (part, local) in parts.items():
            kept = self._host.get(name)
            if kept is None or kept.shape != local.shape or kept.dtype != local.dtype:
                kept = torch.empty(local.shape, dtype=local.dtype, pin_memory=pinned)
            kept.copy_(local, non_blocking=pinned)
            found[name] = part, kept
        if pinned:
            torch.cuda.synchronize()
        self._host = {name: kept for name, (_, kept) in found.items()}
        return found

    def _write(self, folder: str, parts: Mapping[str, tuple[Part, Tensor]]) -> None:
        try:
            uri = storage.join(folder, f"rank_{self.rank:05}.safetensors")
            self._outcome = {"report": write_shard(uri, parts, rank=self.rank)}
        except StorageError as error:
            self._outcome = {"failed": str(error)}
        except PosttrainError as error:
            self._outcome = {"raised": error}
        except Exception as error:
            self._outcome = {"failed": f"{folder}: {type(error).__name__}: {error}"}
