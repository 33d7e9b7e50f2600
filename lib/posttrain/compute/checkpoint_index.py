"""What a checkpoint holds: of every tensor the shape, the dtype, and where each part of it lies.

Plain JSON, checked entry by entry when it is read: nothing in a checkpoint is executed or unpickled, which is why
this is not torch's distributed checkpoint, whose `.metadata` is a pickle. Parts are boxes of the whole tensor, so
any number of ranks, on any mesh, reads what any other number wrote.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from posttrain.compute.shard_file import DTYPES, NAMES, Stored, pieces
from posttrain.compute.shards import Part
from posttrain.errors import CheckpointError, DamagedError

FILE = re.compile(r"rank_\d{5}\.safetensors")
SHOWN = 10
"""Differences that a refusal lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A whole tensor."""

    dtype: str
    """As safetensors names it: F32, BF16."""
    shape: tuple[int, ...]
    parts: tuple[Stored, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """All tensors of a checkpoint."""

    tensors: dict[str, Entry]
    files: dict[str, int]
    """Bytes of every file."""

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values())

    def stored(self) -> dict[str, tuple[Stored, ...]]:
        return {name: entry.parts for name, entry in self.tensors.items()}

    def only(self, prefix: str) -> "Index":
        """The tensors whose names begin with `prefix`."""
        kept = {name: entry for name, entry in self.tensors.items() if name.startswith(prefix)}
        return Index(tensors=kept, files=self.files)

    def check_same(self, tensors: Mapping[str, Tensor], *, where: str) -> None:
        """Refuse to read into tensors of other names, shapes or dtypes; moves no data and takes no memory.

        Raises:
            CheckpointError: lists the first differences.
        """
        mine = {name: f"{NAMES[tensor.dtype]} {list(tensor.shape)}" for name, tensor in tensors.items()}
        missing = sorted(mine.keys() - self.tensors.keys())
        if missing and all(name.startswith("optimizer.") for name in missing):
            raise CheckpointError(
                f"{where} has no optimizer state of {len(missing)} tensors: {_few(missing)}; "
                "resume from a checkpoint that has it, or start a new run from an export of these weights"
            )
        differences = [f"{name} is missing" for name in missing]
        differences += [f"{name} {self.tensors[name]} is not expected" for name in self.tensors if name not in mine]
        both = (name for name in self.tensors if name in mine)
        differences += [
            f"{name} {self.tensors[name]} -> {mine[name]}" for name in both if str(self.tensors[name]) != mine[name]
        ]
        if differences:
            raise CheckpointError(
                f"{where} is of another model or optimizer, {len(differences)} differences: {_few(differences)}; "
                "restore the config that it was written with, or start a new run"
            )

    def to_json(self) -> bytes:
        tensors = {
            name: {
                "dtype": entry.dtype,
                "shape": entry.shape,
                "parts": [
                    {"file": p.file, "at": p.part.at, "shape": p.part.shape, "offset": p.offset, "sha256": p.sha256}
                    for p in entry.parts
                ],
            }
            for name, entry in self.tensors.items()
        }
        return json.dumps({"files": self.files, "tensors": tensors}, separators=(",", ":")).encode()


def index_of(shapes: Mapping[str, Sequence[int]], reports: Sequence[Mapping[str, Any]]) -> Index:
    """The index over what every rank reports to have written.

    Args:
        shapes: of the whole tensors.

    Raises:
        ValueError: parts overlap or leave something out, a mistake of our own.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in shapes}
    for report in reports:
        for name, part in report["tensors"].items():
            found[name].append({"file": report["file"], **part})
    document = {
        "files": {report["file"]: report["bytes"] for report in reports},
        "tensors": {
            name: {"dtype": parts[0]["dtype"], "shape": list(shapes[name]), "parts": parts}
            for name, parts in found.items()
            if parts
        },
    }
    index = _parsed(document)
    left_out = [name for name, shape in shapes.items() if name not in index.tensors and prod(shape)]
    assert not left_out, f"no rank wrote {left_out[:3]}"
    return index


def parse_index(data: bytes, *, where: str) -> Index:
    """Read an index that Index.to_json() wrote.

    Raises:
        DamagedError: it is not one.
    """
    try:
        return _parsed(json.loads(data))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DamagedError(f"{where} is no index of a checkpoint: {error!r}") from None


def _parsed(document: Any) -> Index:
    files = {name: int(size) for name, size in document["files"].items()}
    _require(all(FILE.fullmatch(name) for name in files), f"files {list(files)[:3]}")
    tensors = {name: _entry(name, entry, files) for name, entry in document["tensors"].items()}
    return Index(tensors=tensors, files=files)


def _entry(name: str, entry: Any, files: Mapping[str, int]) -> Entry:
    shape, itemsize = _sizes(entry["shape"]), DTYPES[entry["dtype"]].itemsize
    parts, seen = [], set()
    for each in entry["parts"]:
        part, offset, digests = Part(_sizes(each["at"]), _sizes(each["shape"])), each["offset"], each["sha256"]
        _require(Part((0,) * len(shape), shape).common(part) == part, f"{name}: a part lies outside {shape}")
        room = files[each["file"]] - prod(part.shape) * itemsize
        _require(0 <= offset <= room, f"{name}: a part lies outside its file")
        _require(len(digests) == len(pieces(part.shape, itemsize)), f"{name}: {len(digests)} hashes")
        _require(part.at not in seen, f"{name}: two parts begin at {part.at}")
        seen.add(part.at)
        parts.append(Stored(file=each["file"], part=part, offset=offset, sha256=digests))
    covered = sum(prod(p.part.shape) for p in parts)
    _require(covered == prod(shape), f"{name}: parts of {covered} elements, {prod(shape)} in the tensor")
    return Entry(dtype=entry["dtype"], shape=shape, parts=tuple(parts))


def _sizes(values: Any) -> tuple[int, ...]:
    sizes = tuple(values)
    _require(all(type(size) is int and size >= 0 for size in sizes), f"sizes {sizes}")
    return sizes


def _require(true: bool, otherwise: str) -> None:
    if not true:
        raise ValueError(otherwise)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f", and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
