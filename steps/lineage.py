"""From a served model back to its rows: the runs that made it, the files that they read, and which are as they were."""

import json
from typing import Any

from posttrain import storage
from posttrain.data.files import File, open_file
from posttrain.data.source import Source
from posttrain.errors import CheckpointError, DataError
from posttrain.manifest import MANIFEST, json_sha256
from steps.origin import LINEAGE

SAME, CHANGED, GONE = "the same", "changed", "gone"


def lineage(uri: str) -> list[dict[str, Any]]:
    """The runs that made a model, the first one first, each led back to its rows.

    Nothing large is read: a file is the same where size and version are (mtime on disk, ETag on S3), a folder of
    the run where its manifest is that of the lineage.

    Args:
        uri: an exported folder, as of a registry's champion.

    Returns:
        one mapping a run: its entry of lineage.json, and data and tokens ("the same", "changed" or "gone": the run's
        own folders); sets: prompt sets with their sha256; sources: key, rows, fingerprint, and files with uri, rows,
        fingerprint and state; shards: the files of tokens, alike.

    Raises:
        CheckpointError: no model that a run has exported.
    """
    path = storage.join(uri, LINEAGE)
    if not storage.exists(path):
        raise CheckpointError(
            f"{path} does not exist: no run of posttrain exported that folder. Fix: name the export/ of a run"
        )
    return [_led_back(run) for run in json.loads(storage.read_bytes(path))]


def _led_back(run: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {**run, "sets": {}, "sources": [], "shards": []}
    for name in ("data", "tokens"):
        folder = run.get(f"{name}_uri")  # exports of older versions do not name their folders
        found[name] = GONE if folder is None else _state(folder, run[f"{name}_sha256"])
    if found["data"] != GONE:
        files = storage.manifest_of(run["data_uri"])["files"]
        found["sets"] = {name: file["sha256"] for name, file in files.items() if name.endswith(".parquet")}
        found["sources"] = [
            {"key": s.key, "rows": s.num_rows, "fingerprint": s.fingerprint, "files": _files(s)}
            for s in _sources(run["data_uri"])
        ]
    if found["tokens"] != GONE:
        found["shards"] = [file for source in _sources(run["tokens_uri"]) for file in _files(source)]
    return found


def _state(folder: str, sha256: str) -> str:
    if not storage.exists(storage.join(folder, MANIFEST)):
        return GONE
    return SAME if json_sha256(storage.manifest_of(folder)["files"]) == sha256 else CHANGED


def _sources(folder: str) -> list[Source]:
    path = storage.join(folder, "sources.json")
    if not storage.exists(path):
        return []
    return [Source.indexed(index) for index in json.loads(storage.read_bytes(path))]


def _files(source: Source) -> list[dict[str, Any]]:
    return [
        {
            "uri": shard.file.uri,
            "rows": shard.num_rows,
            "fingerprint": shard.fingerprint,
            "state": _of_file(shard.file),
        }
        for shard in source.shards
    ]


def _of_file(file: File) -> str:
    if not storage.exists(file.uri):
        return GONE
    try:
        with open_file(file) as opened:
            opened.read(1)  # on S3 the first read finds out whether it is that version
    except DataError:
        return CHANGED
    return SAME


if __name__ == "__main__":
    import sys

    print(json.dumps(lineage(sys.argv[1]), indent=2))
