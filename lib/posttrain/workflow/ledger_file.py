"""The ledger on disk or S3: one JSON line for every global batch, in step order, for `posttrain audit` to read.

A line is {"step", "digest", "draws", "dropped"}, as Ledger.commit() gives it. Lines of steps that a checkpoint
holds are durable before it is committed; later ones may be torn or lost, and are written again when a resume
repeats their steps.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain import storage
from posttrain.errors import CheckpointError, StorageError

FIELDS = {"step", "digest", "draws", "dropped"}


class LedgerFile:
    """The file of one training program, written by one process: restore() first, then append() every step."""

    def __init__(self, uri: str):
        self.uri, self.step = uri, 0
        self._restored = False
        self._lines: list[bytes] | None = None
        """On S3, where an object cannot grow: all lines. A crash costs those since the last flush()."""

    def restore(self, step: int) -> None:
        """Keep the lines of the steps before `step`, and forget the rest, whole or torn.

        Raises:
            CheckpointError: a line before `step` is missing or not whole; names it.
        """
        found = storage.read_bytes(self.uri) if storage.exists(self.uri) else b""
        lines = _whole_lines(found)[:step]
        for number, line in enumerate(lines):
            _row(self.uri, number, line)
        if len(lines) < step:
            raise CheckpointError(
                f"{self.uri} ends before the line of step {len(lines)}, and the checkpoint holds {step} steps; "
                "bring the file back as it was, or start a new run"
            )
        self.step, self._restored = step, True
        if storage.is_s3(self.uri):
            self._lines = lines
            return
        Path(self.uri).parent.mkdir(parents=True, exist_ok=True)
        with open(self.uri, "ab") as file:  # cut, not rewritten: the lines that stay were made durable long ago
            file.truncate(sum(map(len, lines)))

    def append(self, row: Mapping[str, Any]) -> None:
        """Add the line of the next step.

        Raises:
            StorageError: the disk takes no more; a torn line is forgotten by the resume.
        """
        assert self._restored, f"{self.uri}: restore() comes before append()"
        assert row["step"] == self.step and row.keys() == FIELDS, f"{self.uri}: step {self.step} is next, got {row}"
        line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        self.step += 1
        if self._lines is not None:
            self._lines.append(line)
            return
        try:
            with open(self.uri, "ab") as file:
                file.write(line)
        except OSError as error:
            raise StorageError(
                f"{self.uri}: {error.strerror}; a run without its ledger proves nothing, so it ends. Fix: make room, "
                "and start it again; it goes on from its last checkpoint"
            ) from None

    def flush(self) -> None:
        """Make every line so far durable; call it before a checkpoint of its step is committed, and at the end."""
        if not self._restored:
            return  # a run that failed before it read its file leaves it as it is
        if self._lines is not None:
            storage.write_bytes(self.uri, b"".join(self._lines))
            return
        for path in (self.uri, os.path.dirname(self.uri)):  # the folder holds the file's name
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def close(self) -> None:
        """flush(); named so for contextlib.closing, which keeps on S3 the last lines of a run that fails."""
        self.flush()


def read_ledger(uri: str) -> list[dict[str, Any]]:
    """The rows of steps 0, 1, 2, …; a torn last line, which a killed run may leave, is left out.

    Raises:
        CheckpointError: not there, or a line is not the row of its step; names it.
    """
    if not storage.exists(uri):
        raise CheckpointError(f"{uri} does not exist; give the root of a run that has trained")
    return [_row(uri, number, line) for number, line in enumerate(_whole_lines(storage.read_bytes(uri)))]


def _whole_lines(data: bytes) -> list[bytes]:
    return [line + b"\n" for line in data.split(b"\n")[:-1]]


def _row(uri: str, step: int, line: bytes) -> dict[str, Any]:
    """The row of a line, which must be that of `step`: lines and steps are both counted from 0."""
    try:
        row = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        row = None
    if not isinstance(row, dict) or row.keys() != FIELDS:
        raise CheckpointError(
            f"{uri}: line {step + 1}, of step {step}, is damaged: {line[:60]!r}; "
            "bring the file back as it was, or start a new run"
        )
    if row["step"] != step:
        raise CheckpointError(
            f"{uri}: line {step + 1} is of step {row['step']} where step {step} belongs: lines are lost or repeated; "
            "bring the file back as it was, or start a new run"
        )
    return row
