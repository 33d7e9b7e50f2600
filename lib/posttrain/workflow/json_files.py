"""JSON files below one root, on disk or on S3, that many processes write: each once, or by compare-and-swap.

On disk a file lock is held over the look and the rename; on S3 the puts are conditional. Readers see the old bytes or
the new, also after a power cut.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from posttrain import s3, storage
from posttrain.compute.lease import file_lock
from posttrain.errors import CheckpointError

FORMAT = 1
"""Version of the layout of the files; each says it."""

LOCK = "registry.lock"


def read(uri: str) -> dict[str, Any] | None:
    """A file's document; None where there is no file.

    Raises:
        CheckpointError: it is no JSON, or of another format.
    """
    return _read(uri)[0]


def write_once(root: str, name: str, document: Mapping[str, Any]) -> bool:
    """Write a file that is not there; False, and nothing is done, where it is."""
    uri = storage.join(root, name)
    if storage.is_s3(uri):
        return s3.put_object(uri, _bytes(document))
    with _alone(root):
        if storage.exists(uri):
            return False
        _replace(Path(uri), _bytes(document))
        return True


def swap(root: str, name: str, seen: dict[str, Any] | None, document: Mapping[str, Any]) -> bool:
    """Put a document over the one that was `seen`, None for no file; False, and nothing done, where another is there.

    The document must differ from what any other process would write, as by a time or a name.
    """
    uri = storage.join(root, name)
    with _alone(root):
        while True:
            now, tag = _read(uri)
            if now != seen:
                return False
            if not storage.is_s3(uri):
                _replace(Path(uri), _bytes(document))
                return True
            # A put that conflicts with another may fail though neither is done: look again.
            if s3.put_object(uri, _bytes(document), replaces=tag if now else None):
                return True


def _read(uri: str) -> tuple[dict[str, Any] | None, str]:
    """The document, and its ETag on S3."""
    if not storage.exists(uri):
        return None, ""
    data, tag = s3.get_object(uri) if storage.is_s3(uri) else (storage.read_bytes(uri), "")
    try:
        found = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{uri} is damaged: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CheckpointError(f"{uri} has another format than {FORMAT}; it was written by another version of posttrain")
    return found, tag


@contextmanager
def _alone(root: str) -> Iterator[None]:
    with nullcontext() if storage.is_s3(root) else file_lock(Path(root, LOCK)):
        yield


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.tmp")
    part.write_bytes(data)
    storage.fsync(part)
    part.replace(path)
    storage.fsync(path.parent)


def _bytes(document: Mapping[str, Any]) -> bytes:
    return json.dumps({**document, "format": FORMAT}, indent=2, sort_keys=True).encode() + b"\n"
