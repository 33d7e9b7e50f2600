"""A committed checkpoint, opened: its manifest, index and plain values, each proved before it is believed."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain import storage
from posttrain.compute.checkpoint_index import Index, parse_index
from posttrain.errors import CheckpointError, DamagedError
from posttrain.manifest import MANIFEST, is_inside, json_sha256

STEP = re.compile(r"step_(\d{6,})")
STATE, INDEX = "state.json", "index.json"
FORMAT = 1
"""Version of a checkpoint's layout; readers of a later version go on reading it."""
FIELDS = {"files", "folder", "step", "token", "identity", "made_from"}
SHOWN = 10
"""Differences that a refusal lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A committed checkpoint whose small files are proved; the shards are proved when they are read."""

    step: int
    """Optimizer steps done when it was written."""
    uri: str
    folder: str
    """Where its files are."""
    manifest: dict[str, Any]
    state: dict[str, Any]
    """Plain values: data cursor, ledger, weight version, metrics so far."""
    index: Index


def open_checkpoint(uri: str) -> Found:
    """A committed checkpoint, its small files proved.

    Raises:
        DamagedError: a small file is missing or differs from its hash; names it.
        CheckpointError: not committed, or in a format that this version does not know.
    """
    manifest = _manifest(uri)
    folder = storage.join(uri, manifest["folder"]) if manifest["folder"] else uri
    index = parse_index(_proved(uri, manifest, INDEX), where=storage.join(folder, INDEX))
    state = _state(uri, manifest)
    return Found(step=manifest["step"], uri=uri, folder=folder, manifest=manifest, state=state, index=index)


def read_state(uri: str) -> dict[str, Any]:
    """A checkpoint's plain values, proved by its manifest; its tensors stay unread."""
    return _state(uri, _manifest(uri))


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as it is written, with a hash of itself."""
    return json.dumps({**manifest, "sha256": json_sha256(manifest)}, indent=2, sort_keys=True).encode()


def fact(data: bytes) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _manifest(uri: str) -> dict[str, Any]:
    where = storage.join(uri, MANIFEST)
    if not storage.exists(where):
        raise CheckpointError(f"{uri} has no {MANIFEST}: it was never committed")
    try:
        manifest = json.loads(storage.read_bytes(where))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != json_sha256(manifest):
        raise DamagedError(f"{where} differs from its own hash: the bytes changed after they were written")
    if manifest.get("checkpoint_format") != FORMAT:
        raise CheckpointError(
            f"{where} has format {manifest.get('checkpoint_format')}, and this version of posttrain reads {FORMAT}; "
            "read it with the version that wrote it"
        )
    if missing := FIELDS - manifest.keys():
        raise DamagedError(f"{where} has no {sorted(missing)}")
    if not _is_sound(manifest):
        raise DamagedError(f"{where} holds values that no checkpoint has, or a folder elsewhere")
    return manifest


def _is_sound(manifest: Mapping[str, Any]) -> bool:
    folder, files, step = manifest["folder"], manifest["files"], manifest["step"]
    return isinstance(files, dict) and type(step) is int and isinstance(folder, str | None) and is_inside(folder or "")


def _state(uri: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    try:
        state = json.loads(_proved(uri, manifest, STATE))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{storage.join(uri, STATE)} is not JSON: {error}") from None
    if not isinstance(state, dict):
        raise DamagedError(f"{storage.join(uri, STATE)} is no JSON object")
    return state


def _proved(uri: str, manifest: Mapping[str, Any], name: str) -> bytes:
    relative = storage.join(manifest["folder"], name) if manifest["folder"] else name
    where = storage.join(uri, relative)
    if not storage.exists(where):
        raise DamagedError(f"{where} is missing")
    data = storage.read_bytes(where)
    if manifest["files"].get(relative) != fact(data):
        raise DamagedError(f"{where} differs from its hash: the bytes changed after they were written")
    return data
