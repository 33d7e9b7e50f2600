"""A manifest: the list of a folder's files with size and sha256. A folder without a true one is not there."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from posttrain.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
"""Version of the manifest's own layout."""


def file_sha256(path: str | Path) -> str:
    """Hash of a file's bytes, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """Hash of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(folder: str | Path, **facts: Any) -> dict[str, Any]:
    """Hash and fsync every file of `folder`, then write manifest.json with those hashes and `facts`."""
    folder = Path(folder)
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = {"format": FORMAT, "files": files, **facts}
    part = folder / f"{MANIFEST}.tmp"
    with open(part, "w") as file:
        json.dump(manifest, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / MANIFEST)  # never through an inode that another folder may share
    return manifest


def read_manifest(folder: str | Path, *, shown_as: str | None = None) -> dict[str, Any]:
    """The manifest of a local folder.

    Raises:
        CheckpointError: absent, not JSON, of another format, or without its list of files.
    """
    name = shown_as or str(folder)
    path = Path(folder, MANIFEST)
    if not path.is_file():
        raise CheckpointError(f"{name} has no {MANIFEST}: it was never committed")
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}/{MANIFEST} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{name}/{MANIFEST} has another format than {FORMAT}; it was written by another version")
    if not isinstance(files := manifest.get("files"), dict) or not all(map(_is_fact, files.values())):
        raise CheckpointError(f"{name}/{MANIFEST} does not list files with bytes and sha256: it is damaged")
    return manifest


def is_inside(relative: str) -> bool:
    """Whether a path that someone else wrote stays in the folder that it is joined to."""
    return not relative.startswith("/") and "\0" not in relative and ".." not in relative.split("/")


def _is_fact(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("bytes")) is int and isinstance(value.get("sha256"), str)


def verify_folder(folder: str | Path, *, shown_as: str | None = None) -> dict[str, Any]:
    """Check every file against the manifest and return it.

    Raises:
        CheckpointError: names the first file that is missing, truncated or changed.
    """
    name = shown_as or str(folder)
    manifest = read_manifest(folder, shown_as=shown_as)
    for relative, expected in manifest["files"].items():
        if not is_inside(relative):
            raise CheckpointError(f"{name}/{MANIFEST} names {relative!r}, which is not in its folder; do not trust it")
        path = Path(folder, relative)
        if not path.is_file():
            raise CheckpointError(f"{name}/{relative} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{name}/{relative} has {path.stat().st_size} bytes, expected {expected['bytes']}")
        if file_sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{name}/{relative} differs from its hash: the bytes changed after they were written")
    return manifest
