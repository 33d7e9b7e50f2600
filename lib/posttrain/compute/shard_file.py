"""The file in which one rank keeps its parts of the training state, written and read piece by piece.

It is a safetensors file, so that other tools open it; written here in one pass, because safetensors' own writer
would need a second one to hash. A piece is whole rows of one tensor, at most PIECE_BYTES where a row is not larger,
and has a sha256 of its own: a rank that reads a few rows proves these and reads no others. sha256 because it needs
no dependency and Python lets go of its lock meanwhile: 1.3 GB/s a thread on a server CPU with SHA instructions, the
fastest hash of hashlib there (blake2b 0.9, md5 0.7), and several threads hash while one writes.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from posttrain import faults, s3, storage
from posttrain.compute.shards import Part, bytes_of, held
from posttrain.compute.sinks import sink
from posttrain.errors import DamagedError

PIECE_BYTES = 16 * 1024 * 1024
THREADS = min(8, os.cpu_count() or 1)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""As safetensors names them."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A part of a tensor in a file."""

    file: str
    part: Part
    offset: int
    """Bytes from the beginning of the file."""
    sha256: Sequence[str]
    """Of its pieces, in order."""


def pieces(shape: Sequence[int], itemsize: int) -> list[range]:
    """Rows of every piece of a part with this shape; a scalar is one row."""
    rows, row_bytes = (shape[0], prod(shape[1:]) * itemsize) if shape else (1, itemsize)
    step = max(1, PIECE_BYTES // row_bytes)
    return [range(first, min(first + step, rows)) for first in range(0, rows, step)]


def write_shard(uri: str, parts: Mapping[str, tuple[Part, Tensor]], *, rank: int) -> dict[str, Any]:
    """Write this rank's parts, contiguous and on the CPU, and return what the index needs to know of them.

    On disk the file is read back and proved before this returns; S3 proves what it is sent by checksums.

    Raises:
        StorageError: the disk is full, or the store does not answer.
        DamagedError: what was written does not read back.
    """
    header, offsets = _header(parts)
    total = len(header) + sum(local.nbytes for _, local in parts.values())
    digests: dict[str, list[str]] = {}
    with ThreadPoolExecutor(THREADS) as pool, sink(uri, total) as out:
        out.write(memoryview(header))
        hashing = {}
        for name, (part, local) in parts.items():
            cut = list(_cut(part, local))
            hashing[name] = [pool.submit(_sha256, piece) for piece in cut]
            for piece in cut:
                out.write(piece)
            faults.point("checkpoint.mid_shard", rank)
        digests = {name: [each.result() for each in found] for name, found in hashing.items()}
    file = uri.rsplit("/", 1)[1]
    tensors = {
        name: {
            "dtype": NAMES[local.dtype],
            "at": part.at,
            "shape": part.shape,
            "offset": offsets[name],
            "sha256": digests[name],
        }
        for name, (part, local) in parts.items()
    }
    if not storage.is_s3(uri):
        _read_back(uri, tensors)
    faults.point("checkpoint.after_tensors", rank)
    return {"file": file, "bytes": total, "tensors": tensors}


def read_parts(folder: str, stored: Mapping[str, Sequence[Stored]], tensors: Mapping[str, Tensor]) -> None:
    """Fill this rank's part of every tensor from the parts that were stored, whatever ranks wrote them.

    Reads and proves only the pieces that hold elements of this rank.

    Args:
        tensors: plain or DTensor, of the shape and dtype of what was stored.

    Raises:
        DamagedError: a piece is not what was committed; names its file and tensor.
    """
    where = {name: held(tensor) for name, tensor in tensors.items()}
    jobs = [
        (name, each, numbered)
        for name, (_, local) in where.items()
        for each in stored[name]
        for numbered in enumerate(pieces(each.part.shape, local.element_size()))
    ]

    def read(job: tuple[str, Stored, tuple[int, range]]) -> None:
        name, each, numbered = job
        _read_piece(storage.join(folder, each.file), name, each, numbered, where[name])

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(read, jobs):
            pass


def _read_piece(uri: str, name: str, stored: Stored, numbered: tuple[int, range], mine: tuple[Part, Tensor]) -> None:
    (number, rows), (part, local) = numbered, mine
    at, shape = stored.part.at, stored.part.shape
    piece = Part((at[0] + rows.start, *at[1:]), (len(rows), *shape[1:])) if shape else stored.part
    common = piece.common(part)
    if common is None or not local.numel():
        return
    row_bytes = prod(shape[1:]) * local.element_size()
    first = stored.offset + rows.start * row_bytes
    data = _read(uri, range(first, first + len(rows) * row_bytes))
    if _sha256(memoryview(data)) != stored.sha256[number]:
        raise DamagedError(f"{uri}: {name} differs from its hash: the bytes changed after they were written")
    value = torch.frombuffer(data, dtype=local.dtype).reshape(piece.shape)
    local[common.slices_in(part)].copy_(value[common.slices_in(piece)])


def _read(uri: str, span: range) -> bytearray:
    if storage.is_s3(uri):
        data = bytearray(s3.get_object(uri, span)[0])
        found = len(data)
    else:
        try:
            descriptor = os.open(uri, os.O_RDONLY)
        except FileNotFoundError:
            raise DamagedError(f"{uri} is missing") from None
        try:
            data = bytearray(len(span))
            found = os.preadv(descriptor, [data], span.start)
        finally:
            os.close(descriptor)
    if found != len(span):
        raise DamagedError(f"{uri} ends before byte {span.stop}")
    return data


def _header(parts: Mapping[str, tuple[Part, Tensor]]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and where each tensor then begins in the file."""
    at, entries = 0, {}
    for name, (part, local) in parts.items():
        ends = [at, at + local.nbytes]
        entries[name] = {"dtype": NAMES[local.dtype], "shape": list(part.shape), "data_offsets": ends}
        at = ends[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + entry["data_offsets"][0] for name, entry in entries.items()}
    return len(text).to_bytes(8, "little") + text, offsets


def _cut(part: Part, local: Tensor) -> Iterator[memoryview]:
    data, row_bytes = bytes_of(local), prod(part.shape[1:]) * local.element_size()
    for rows in pieces(part.shape, local.element_size()):
        yield data[rows.start * row_bytes : rows.stop * row_bytes]


def _read_back(uri: str, tensors: Mapping[str, dict[str, Any]]) -> None:
    jobs = []
    for entry in tensors.values():
        itemsize = DTYPES[entry["dtype"]].itemsize
        row_bytes = prod(entry["shape"][1:]) * itemsize
        for rows, digest in zip(pieces(entry["shape"], itemsize), entry["sha256"], strict=True):
            first = entry["offset"] + rows.start * row_bytes
            jobs.append((range(first, first + len(rows) * row_bytes), digest))
    with ThreadPoolExecutor(THREADS) as pool:
        for right in pool.map(lambda job: _sha256(memoryview(_read(uri, job[0]))) == job[1], jobs):
            if not right:
                raise DamagedError(f"{uri} does not read back as it was written; see that the disk is sound")


def _sha256(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
