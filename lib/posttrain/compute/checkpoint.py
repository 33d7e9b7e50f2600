"""Training state on disk or S3: committed whole, verified when read, never a moment without a good one."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain import faults, storage
from posttrain.errors import CheckpointError

STEP = re.compile(r"step_(\d{6,})")
TENSORS, STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A verified checkpoint."""

    step: int
    """Optimizer steps done when it was written."""
    uri: str
    folder: Path
    """Local copy of its files."""
    state: dict[str, Any]
    """Plain values: data cursor, ledger, weight version, metrics so far."""

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and optimizer state by name."""
        return read_tensors(self.folder)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Parameters and optimizer state of a checkpoint's local, verified folder."""
    return load_file(folder / TENSORS)


class Checkpoints:
    """The checkpoints of one training program, under one URI.

    Args:
        identity: what must be equal for a checkpoint to be continued: config hash,
            tokenizer and data fingerprints.
    """

    def __init__(self, uri: str, *, identity: Mapping[str, str], keep: int):
        self.uri, self.identity, self.keep = uri, dict(identity), keep

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> str:
        """Commit state after `step` optimizer steps, then drop the oldest beyond `keep`; return its URI.

        A step that is already committed is left as it is.
        """
        uri = storage.join(self.uri, f"step_{step:06d}")
        if storage.exists(storage.join(uri, "manifest.json")):
            return uri
        with storage.staging(uri) as folder:
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, folder / TENSORS)
            faults.point("checkpoint.after_tensors")
            (folder / STATE).write_text(json.dumps(state))
            storage.publish(folder, uri, step=step, identity=self.identity)
        self._prune()
        return uri

    def latest(self) -> Found | None:
        """The newest checkpoint that verifies, or None.

        A damaged one is set aside, named on the terminal, and the one before it is used.

        Raises:
            CheckpointError: the newest good one belongs to another run; lists what differs.
        """
        for step in reversed(self._steps()):
            uri = storage.join(self.uri, f"step_{step:06d}")
            try:
                folder = storage.fetch(uri)
            except CheckpointError as error:
                print(f"checkpoint {uri} is not usable: {error}; trying the one before", flush=True)
                storage.set_aside(uri)
                continue
            manifest = json.loads((folder / "manifest.json").read_text())
            self._check_identity(uri, manifest["identity"])
            return Found(step=step, uri=uri, folder=folder, state=json.loads((folder / STATE).read_text()))
        return None

    def _check_identity(self, uri: str, found: dict[str, str]) -> None:
        names = sorted(found.keys() | self.identity.keys())
        changed = [n for n in names if found.get(n) != self.identity.get(n)]
        if changed:
            differences = ", ".join(f"{n} {found.get(n)} -> {self.identity.get(n)}" for n in changed)
            raise CheckpointError(f"{uri} was written by another run: {differences}; start a new run or restore these")

    def _steps(self) -> list[int]:
        """Steps with a committed folder, ascending; uncommitted leftovers have other names."""
        matches = (STEP.fullmatch(name) for name in storage.list_folders(self.uri))
        return sorted(int(match[1]) for match in matches if match)

    def _prune(self) -> None:
        """Drop committed checkpoints beyond `keep`; the newest was hashed file by file just before this."""
        uris = [storage.join(self.uri, f"step_{step:06d}") for step in self._steps()]
        committed = [uri for uri in uris if storage.exists(storage.join(uri, "manifest.json"))]
        for uri in committed[: -self.keep]:
            storage.remove_folder(uri)
