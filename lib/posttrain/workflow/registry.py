"""A registry of champions: models that were promoted, and one file that says which of them is served.

A registry is a folder or an s3:// prefix:

    models/FLOW/RUN/               a copy of what a run exported, published whole with its hashes
    versions/NUMBER/manifest.json  never changed: which model, from which run and parent, on which data, how much better
    champion.json                  who was champion, one entry a change; the last one is the champion now
    judged/KEY.json                never changed: a candidate that was compared and not promoted

They are written in that order, the pointer last and only by compare-and-swap, so that it never names a part of a
model; whoever is killed on the way leaves at most a model or a version that nothing points at. All is keyed by run:
the same run promoted twice is promoted once.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from posttrain import faults, storage
from posttrain.errors import CheckpointError
from posttrain.manifest import MANIFEST
from posttrain.workflow import json_files

POINTER = "champion.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Champion:
    """The version that is served."""

    version: int
    generation: int
    """Changes of the pointer so far."""
    model_uri: str
    manifest: dict[str, Any]
    """Of the version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model that was found better than its parent."""

    run: str
    """FLOW/RUN: the same run is the same candidate, however often it is promoted."""
    parent: int | None
    """Version that it was trained from and compared with; None where there was no champion."""
    model_uri: str
    """A published folder."""
    key: str
    """Of parent, data and config: the same again would be the same candidate from another run."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For people and for the next run: data, comparison, lineage."""


def champion(registry: str) -> Champion | None:
    """Who is champion now; None before the first promotion.

    Raises:
        CheckpointError: the pointer or what it names is damaged.
    """
    entries = history(registry)
    if not entries:
        return None
    number = entries[-1]["version"]
    manifest = version(registry, number)
    return Champion(
        version=number,
        generation=entries[-1]["generation"],
        model_uri=_model_uri(registry, manifest),
        manifest=manifest,
    )


def history(registry: str) -> list[dict[str, Any]]:
    """Changes of the champion, the first one first: generation, version, action, run or reason, and time."""
    return _entries(json_files.read(storage.join(registry, POINTER)))


def version(registry: str, number: int) -> dict[str, Any]:
    """The manifest of a version.

    Raises:
        CheckpointError: there is no such version; names those that there are.
    """
    found = json_files.read(storage.join(registry, "versions", str(number), MANIFEST))
    if found is None:
        there = ", ".join(map(str, versions(registry))) or "none"
        raise CheckpointError(f"{registry} has no version {number}; it has {there}")
    return found


def versions(registry: str) -> list[int]:
    """Numbers of all versions; one that was never champion lost a race, or its run was killed."""
    there = sorted(int(name) for name in storage.list_folders(storage.join(registry, "versions")) if name.isdigit())
    return [number for number in there if storage.exists(storage.join(registry, "versions", str(number), MANIFEST))]


def promote(registry: str, candidate: Candidate) -> dict[str, Any]:
    """Make a candidate the champion, unless its parent is no longer that.

    May be killed at any point and called again: what the run has done before is found and not done twice.

    Returns:
        outcome: "promoted", also where this run was promoted before; "stale" where another came first.
        version: the candidate's, None where it is stale; champion: the version that is champion now.

    Raises:
        CheckpointError: the copy differs from the model, or the run's name is another model's.
    """
    entries = history(registry)
    if _promoted(entries, candidate.run) is None and _head(entries) == candidate.parent:
        model = _bring_model(registry, candidate)
        number = _version_of_run(registry, candidate) or _add_version(registry, candidate, model)
        # Of two candidates of one parent the second finds another pointer than it has seen.
        entries = _point_to(registry, entries, {"version": number, "action": "promote", "run": candidate.run})
        faults.point("registry.after_pointer")
    number = _promoted(entries, candidate.run)
    return {"outcome": "stale" if number is None else "promoted", "version": number, "champion": _head(entries)}


def rollback(registry: str, *, reason: str, to: int | None = None) -> dict[str, Any]:
    """Make an earlier version the champion again: `to`, or the one that the champion was compared with.

    Nothing is deleted. A version that is the champion already is left in peace, so `to` may be said twice.

    Returns:
        outcome "rolled back" or "unchanged", and champion.

    Raises:
        CheckpointError: there is no such version, its model is damaged, or the champion changed meanwhile.
    """
    entries = history(registry)
    if not entries:
        raise CheckpointError(f"{registry} has no champion: nothing was promoted there")
    now = entries[-1]["version"]
    target = version(registry, now)["parent"] if to is None else to
    if target is None:
        raise CheckpointError(f"{registry}: version {now} is the first of its line, there is none to go back to")
    if target == now:
        return {"outcome": "unchanged", "champion": now}
    check_model(_model_uri(registry, version(registry, target)))
    after = _point_to(registry, entries, {"version": target, "action": "rollback", "reason": reason})
    if _head(after) != target:
        raise CheckpointError(f"{registry}: version {_head(after)} became champion meanwhile; look, and say it again")
    return {"outcome": "rolled back", "champion": target}


def check_model(uri: str) -> None:
    """Read every byte of a published folder.

    Raises:
        CheckpointError: names the first file that is not what was written.
    """
    folder = storage.fetch(uri)
    if storage.is_s3(uri):
        shutil.rmtree(folder)


def tried(registry: str, parent: int | None, key: str) -> str | None:
    """What became of a candidate of that key, for people; None where it was not judged yet.

    One that was champion, and is not because it was rolled back, is not to come back by itself.
    """
    judged = json_files.read(storage.join(registry, "judged", f"{key}.json"))
    if judged is not None:
        return f"tried by {judged['run']} and not promoted: {judged['why']}"
    crowned = {entry["version"] for entry in history(registry)}
    for number in versions(registry):
        if number in crowned and number > (parent or 0) and version(registry, number)["key"] == key:
            return f"promoted as version {number}, which was rolled back"
    return None


def note_judged(registry: str, key: str, found: Mapping[str, Any]) -> None:
    """Remember why a candidate was not promoted, and by which run; the first note of a key stays."""
    json_files.write_once(registry, f"judged/{key}.json", found)


def _bring_model(registry: str, candidate: Candidate) -> dict[str, str]:
    """Copy the model into the registry and prove the copy; what a version says of it."""
    relative = f"models/{candidate.run}"
    uri = storage.join(registry, relative)
    if not storage.exists(storage.join(uri, MANIFEST)):
        with storage.staging(uri) as folder:
            source = storage.fetch(candidate.model_uri)
            shutil.copytree(source, folder, dirs_exist_ok=True)
            if storage.is_s3(candidate.model_uri):
                shutil.rmtree(source)
            storage.publish(folder, uri, run=candidate.run)
        faults.point("registry.after_model")
    check_model(uri)
    here, there = storage.manifest_of(uri), storage.manifest_of(candidate.model_uri)
    if here["files"] != there["files"]:
        raise CheckpointError(f"{uri} is not {candidate.model_uri}, but another model of this run's name")
    return {"path": relative, "manifest_sha256": _digest(uri)}


def _add_version(registry: str, candidate: Candidate, model: dict[str, str]) -> int:
    """Write the manifest of a new version under the next free number."""
    known = {"run": candidate.run, "parent": candidate.parent, "key": candidate.key, "model": model, "time": _now()}
    number = max(versions(registry), default=0) + 1
    while not json_files.write_once(
        registry, f"versions/{number}/{MANIFEST}", {**candidate.facts, **known, "version": number}
    ):
        number += 1
    faults.point("registry.after_version")
    return number


def _version_of_run(registry: str, candidate: Candidate) -> int | None:
    """The version that an earlier attempt of the same run wrote; it is younger than its parent."""
    newer = [number for number in versions(registry) if number > (candidate.parent or 0)]
    return next((n for n in newer if version(registry, n)["run"] == candidate.run), None)


def _model_uri(registry: str, manifest: Mapping[str, Any]) -> str:
    """Where a version's model is, its manifest proved to be the one that was promoted."""
    uri = storage.join(registry, manifest["model"]["path"])
    if _digest(uri) != manifest["model"]["manifest_sha256"]:
        raise CheckpointError(f"{uri} is not the model that version {manifest['version']} of {registry} was made of")
    return uri


def _digest(uri: str) -> str:
    """Of a published folder's manifest, which has the hashes of all its files; empty where none is published."""
    manifest = storage.join(uri, MANIFEST)
    return hashlib.sha256(storage.read_bytes(manifest)).hexdigest() if storage.exists(manifest) else ""


def _point_to(registry: str, seen: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Add an entry to the pointer if it is still what was `seen`; its entries now, with ours or another's."""
    added = [*seen, {"generation": len(seen) + 1, **entry, "time": _now()}]
    before = {"format": json_files.FORMAT, "history": seen} if seen else None
    done = json_files.swap(registry, POINTER, before, {"history": added})
    return added if done else history(registry)


def _entries(pointer: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [] if pointer is None else pointer["history"]


def _promoted(entries: list[dict[str, Any]], run: str) -> int | None:
    """The version as which a run was promoted, though another may be champion by now."""
    return next((entry["version"] for entry in entries if entry.get("run") == run), None)


def _head(entries: list[dict[str, Any]]) -> int | None:
    return entries[-1]["version"] if entries else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
