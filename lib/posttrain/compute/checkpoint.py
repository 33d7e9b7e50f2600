"""Training state on disk or S3: committed whole, proved when read, never a moment without a good one.

    step_000010/manifest.json     the commit, written last: hashes of the two below, step, lease, identity
    step_000010/index.json        of every tensor, where its parts lie (checkpoint_index.py)
    step_000010/state.json        plain values: data cursor, ledger, history
    step_000010/rank_00000.safetensors …   what each rank wrote by itself (shard_file.py)

On disk all of it is filled as step_000010.tmp-<attempt> and renamed; on S3, which cannot rename, the files are keys
below step_000010/<attempt>/ and the manifest names them. Readers look at manifests only.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain import faults, s3, storage
from posttrain.compute.checkpoint_index import index_of
from posttrain.compute.committed import FORMAT, INDEX, SHOWN, STATE, STEP, Found, fact, open_checkpoint, sealed
from posttrain.compute.lease import Lease
from posttrain.errors import CheckpointError, DamagedError, StorageError
from posttrain.manifest import MANIFEST


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A save under way."""

    step: int
    name: str
    folder: str
    """Where the ranks write."""


class Checkpoints:
    """The checkpoints of one training program, under one URI.

    Args:
        identity: what must be equal for a checkpoint to be continued, as plain values by dotted name.
        made_from: what an export needs to know: model_uri, backend.
    """

    def __init__(self, uri: str, *, identity: Mapping[str, Any], keep: int, made_from: Mapping[str, str] | None = None):
        self.uri, self.identity, self.keep = uri, dict(identity), keep
        self.made_from = dict(made_from or {})
        self.lease = Lease(uri)

    @contextmanager
    def writing(self) -> Iterator["Checkpoints"]:
        """Hold the lease of this root, without which nothing is committed; leftovers of dead writers are removed.

        Raises:
            CheckpointError: another process writes here, or the newest checkpoint belongs to another run.
        """
        self.lease.acquire()
        try:
            self._sweep()
            self.latest()
            yield self
        finally:
            self.lease.release()

    def latest(self) -> Found | None:
        """The newest checkpoint whose small files verify and whose shards are there in full, or None.

        A damaged one is set aside, named on the terminal, and the one before it is used.

        Raises:
            CheckpointError: the newest good one belongs to another run; lists what differs.
        """
        for step in reversed(self._steps()):
            uri = self._uri(step)
            if not storage.exists(storage.join(uri, MANIFEST)):
                continue
            try:
                found = open_checkpoint(uri)
                for name, size in found.index.files.items():
                    _check_size(storage.join(found.folder, name), size)
            except DamagedError as error:
                self.set_aside(uri, error)
                continue
            self._check_identity(uri, found.manifest["identity"])
            return found
        return None

    def set_aside(self, uri: str, cause: Exception) -> None:
        """Make a damaged checkpoint count as uncommitted; its bytes stay for whoever looks into it."""
        where = storage.set_aside(uri)
        print(f"checkpoint {uri} is not usable: {cause}; kept as {where}, trying the one before", flush=True)

    def is_committed(self, step: int) -> bool:
        return storage.exists(storage.join(self._uri(step), MANIFEST))

    def begin(self, step: int, num_bytes: int) -> Attempt:
        """Where the ranks may write the state after `step` optimizer steps.

        Raises:
            StorageError: the disk has no room for `num_bytes`.
        """
        self.lease.check()
        name = f"{self.lease.token}-{uuid.uuid4().hex[:8]}"
        if storage.is_s3(self.uri):
            return Attempt(step=step, name=name, folder=storage.join(self._uri(step), name))
        folder = f"{self._uri(step)}.tmp-{name}"
        Path(self.uri).mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.uri).free
        if free < num_bytes:
            raise StorageError(
                f"{folder}: {num_bytes / 1e9:.3g} GB are needed and {free / 1e9:.3g} GB are free. "
                "Fix: free space, or lower checkpoint.keep"
            )
        return Attempt(step=step, name=name, folder=folder)

    def commit(
        self,
        attempt: Attempt,
        *,
        shapes: Mapping[str, Sequence[int]],
        reports: Sequence[Mapping[str, Any]],
        state: Mapping[str, Any] | str,
    ) -> str:
        """Make what the ranks wrote a checkpoint, then drop the oldest beyond `keep`; return its URI.

        Args:
            shapes: of the whole tensors.
            reports: of all ranks, as Snapshot.result() gives them.
            state: plain values, or their JSON.

        Raises:
            CheckpointError: another process has taken over this root.
            StorageError: the disk is full, or the store does not answer.
        """
        index = index_of(shapes, reports)
        text = state if isinstance(state, str) else json.dumps(state)
        small = {INDEX: index.to_json(), STATE: text.encode()}
        uri = self._uri(attempt.step)
        try:
            for name, data in small.items():
                storage.write_bytes(storage.join(attempt.folder, name), data)
            prefix = f"{attempt.name}/" if storage.is_s3(self.uri) else ""
            manifest = {
                "checkpoint_format": FORMAT,
                "files": {f"{prefix}{name}": fact(data) for name, data in small.items()},
                "folder": prefix.rstrip("/"),
                "step": attempt.step,
                "token": self.lease.token,
                "ranks": len(reports),
                "identity": self.identity,
                "made_from": self.made_from,
            }
            faults.point("checkpoint.before_manifest")
            with self.lease.committing():
                self._publish(attempt, uri, sealed(manifest))
        except OSError as error:
            raise StorageError(f"{attempt.folder}: {error.strerror or error}") from error
        faults.point("checkpoint.after_commit")
        self._prune()
        return uri

    def discard(self, attempt: Attempt) -> None:
        """Remove what a failed save has written."""
        if storage.is_s3(self.uri) or Path(attempt.folder).is_dir():
            storage.remove_folder(attempt.folder)

    def _publish(self, attempt: Attempt, uri: str, manifest: bytes) -> None:
        if storage.is_s3(uri):
            faults.point("checkpoint.before_commit")
            self._put_manifest(storage.join(uri, MANIFEST), manifest)
            return
        folder = Path(attempt.folder)
        (folder / MANIFEST).write_bytes(manifest)
        for path in (*(folder / name for name in (INDEX, STATE, MANIFEST)), folder):
            storage.fsync(path)
        faults.point("checkpoint.before_commit")
        if Path(uri).exists():
            raise CheckpointError(f"{uri} is there already; a committed checkpoint is never overwritten")
        os.rename(folder, uri)
        storage.fsync(self.uri)

    def _put_manifest(self, uri: str, manifest: bytes) -> None:
        if s3.put_object(uri, manifest):
            return
        theirs, version = s3.get_object(uri)
        token = json.loads(theirs)["token"]
        if token >= self.lease.token or not s3.put_object(uri, manifest, replaces=version):
            raise CheckpointError(f"{uri} was committed by another writer, under lease {token}")

    def _check_identity(self, uri: str, found: Mapping[str, Any]) -> None:
        names = sorted(found.keys() | self.identity.keys())
        changed = [n for n in names if found.get(n) != self.identity.get(n)]
        if changed:
            shown = ", ".join(f"{n} {found.get(n)} -> {self.identity.get(n)}" for n in changed[:SHOWN])
            more = f", and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
            raise CheckpointError(f"{uri} was written by another run: {shown}{more}; start a new run or restore these")

    def _uri(self, step: int) -> str:
        return storage.join(self.uri, f"step_{step:06d}")

    def _steps(self) -> list[int]:
        """Steps with a folder of that name, ascending; those of uncommitted leftovers on disk are others."""
        matches = (STEP.fullmatch(name) for name in storage.list_folders(self.uri))
        return sorted(int(match[1]) for match in matches if match)

    def _prune(self) -> None:
        """Drop committed checkpoints beyond `keep`; the newest was read back just before this."""
        for step in [step for step in self._steps() if self.is_committed(step)][: -self.keep]:
            faults.point("checkpoint.before_prune")
            uri = self._uri(step)
            if storage.is_s3(uri):
                storage.remove_folder(uri)
                continue
            doomed = f"{uri}.tmp-pruned"  # a rename is whole; what a crash leaves of it is swept
            os.rename(uri, doomed)
            faults.point("checkpoint.mid_prune")
            storage.remove_folder(doomed)

    def _sweep(self) -> None:
        """Remove what writers that are dead now did not commit."""
        for name in storage.list_folders(self.uri):
            left = storage.join(self.uri, name)
            step, _, rest = name.partition(".tmp-")
            uncommitted = storage.is_s3(left) and not storage.exists(storage.join(left, MANIFEST))
            if STEP.fullmatch(step) and (rest or (uncommitted and not _has_mark(left))):
                storage.remove_folder(left)


def _check_size(uri: str, expected: int) -> None:
    found = storage.size_of(uri)
    if found != expected:
        raise DamagedError(f"{uri} is missing" if found is None else f"{uri} has {found} bytes, expected {expected}")


def _has_mark(uri: str) -> bool:
    """Whether a folder on S3 was set aside; its manifest then has another name."""
    bucket, prefix = s3.place(uri)
    found = s3.patiently(
        f"listing {uri}", lambda c: c.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/{MANIFEST}.", MaxKeys=1)
    )
    return bool(found.get("KeyCount"))
