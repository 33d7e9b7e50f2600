"""One .safetensors file, or a folder of them, on disk or S3: what it holds, and any rows of it.

The header is read and proved first: a file that is cut short, or whose header lies about the bytes
behind it, is refused before a tensor is read. Reads then fetch only the bytes asked for, from any
thread; nothing is mapped, so a file on a network disk that goes away is an error and not a SIGBUS.
"""

import json
import os
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain import storage
from posttrain.data.get_range import Range, get_range
from posttrain.errors import ModelError

INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
LARGEST_HEADER = 100 * 10**6
"""Bytes; the format's own limit (safetensors README)."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The format's names of dtypes that torch has."""

_MOST_ELEMENTS = 2**60
"""Dimensions that torch's strides hold, also those of a tensor without elements."""
_OPENERS = 16
_PREADV_BYTES = 1 << 30  # Linux returns at most 0x7ffff000 bytes a call


class TensorFile:
    """The tensors of one file; its header is already checked. Threads may share it."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def __init__(self, uri: str | Path):
        """
        Raises:
            ModelError: no such file, it is cut short, or its header contradicts itself.
            DataError: S3 did not give the header within get_range's budget.
        """
        self.uri = str(uri)
        self._bytes = _S3Bytes(self.uri) if storage.is_s3(self.uri) else _DiskBytes(self.uri)
        size = self._bytes.size
        if size < 8:
            raise _damaged(self.uri, f"it has {size} bytes, fewer than the 8 that say how long its header is")
        length = int.from_bytes(self._read_bytes(0, 8), "little")
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise _damaged(self.uri, f"its header claims {length} bytes, of a file of {size}")
        header = _parse(self.uri, self._read_bytes(8, length))
        _check_layout(self.uri, header, num_bytes=size - 8 - length)
        self.shapes = {name: entry.shape for name, entry in header.items()}
        self.dtypes = {name: entry.dtype for name, entry in header.items()}
        self._starts = {name: 8 + length + entry.first for name, entry in header.items()}

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Rows start:stop of dimension 0 of a tensor, on the CPU in the file's dtype; all of it by default.

        Raises:
            ModelError: the file ended before its header's promise: it changed since it was opened.
            DataError: S3 did not give the bytes, or the object changed (see get_range).
        """
        shape = self.shapes[name]
        if start is not None or stop is not None:
            start, stop, _ = slice(start, stop).indices(shape[0])
            shape = (max(stop - start, 0), *shape[1:])
        out = torch.empty(shape, dtype=self.dtypes[name])
        self.read_into(name, (start or 0) * prod(shape[1:]), out)
        return out

    def read_into(self, name: str, first: int, out: Tensor) -> None:
        """Fill `out`, contiguous on the CPU and of the file's dtype, with elements from `first` on, in row-major order.

        Raises as read().
        """
        assert out.dtype == self.dtypes[name] and out.is_contiguous() and out.device.type == "cpu"
        assert 0 <= first <= first + out.numel() <= prod(self.shapes[name]), f"{name}: read outside of the tensor"
        if out.numel():
            view = memoryview(out.detach().reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
            self._bytes.read_into(self._starts[name] + first * out.itemsize, view)

    def _read_bytes(self, first: int, length: int) -> bytes:
        data = bytearray(length)
        self._bytes.read_into(first, memoryview(data))
        return bytes(data)


def open_tensor_files(uri: str | Path) -> dict[str, TensorFile]:
    """Tensor name -> the file of a folder that holds it: by its index, else by all files directly in it.

    Raises:
        ModelError: no file, a damaged one, a name in two files, an index that is no index, or one that names
            a file or a tensor that is not there.
    """
    folder = str(uri)
    names = _list(folder)
    if INDEX in names:
        return _indexed(folder, names)
    shards = sorted(name for name in names if name.endswith(SUFFIX))
    if not shards:
        raise ModelError(f"{folder} holds no .safetensors file. Fix: name the folder that holds the model's weights")
    found: dict[str, TensorFile] = {}
    for file in _open(folder, shards).values():
        for name in file.shapes:
            if name in found:
                raise ModelError(
                    f"{folder}: tensor {name} is in {_name(found[name])} and in {_name(file)}. "
                    f"Fix: remove the file that does not belong, or add {INDEX}"
                )
            found[name] = file
    return found


def _indexed(folder: str, names: set[str]) -> dict[str, TensorFile]:
    weight_map = _weight_map(storage.join(folder, INDEX))
    shards = set(weight_map.values())
    if missing := sorted(shards - {name for name in names if name.endswith(SUFFIX)}):
        raise ModelError(f"{folder}: {INDEX} names {missing[0]!r}, which is not there. Fix: copy the missing file")
    single = f"model{SUFFIX}"
    if single in names - shards:
        raise ModelError(
            f"{folder} holds {single} and an index of other files. Fix: remove the one that is out of date"
        )
    files = _open(folder, sorted(shards))
    for name, shard in weight_map.items():
        if name not in files[shard].shapes:
            raise ModelError(f"{folder}: {INDEX} says that {shard} holds {name}; it does not. Fix: copy both again")
    return {name: files[shard] for name, shard in weight_map.items()}


def _weight_map(path: str) -> dict[str, str]:
    try:
        index = json.loads(storage.read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}. Fix: copy it again") from None
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(shard, str) for shard in found.values()):
        raise ModelError(f"{path} has no weight_map from tensor to file names. Fix: copy it again")
    return found


def _open(folder: str, names: Iterable[str]) -> dict[str, TensorFile]:
    """Headers side by side: on S3 each costs three round trips."""
    names = list(names)
    with ThreadPoolExecutor(_OPENERS) as pool:
        files = pool.map(TensorFile, [storage.join(folder, name) for name in names])
        return dict(zip(names, files, strict=True))


def _list(folder: str) -> set[str]:
    """Names directly in a folder; none when it does not exist."""
    if not storage.is_s3(folder):
        return {entry.name for entry in Path(folder).iterdir()} if Path(folder).is_dir() else set()
    bucket, _, prefix = folder.removeprefix("s3://").rstrip("/").partition("/")
    prefix = f"{prefix}/" if prefix else ""
    pages = storage.s3_client().get_paginator("list_objects_v2")
    pages = pages.paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
    return {entry["Key"][len(prefix) :] for page in pages for entry in page.get("Contents", [])}


def _name(file: TensorFile) -> str:
    return file.uri.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a tensor is, bytes after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    end: int


def _parse(uri: str, data: bytes) -> dict[str, _Entry]:
    try:
        header = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(uri, f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise _damaged(uri, "its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(uri, "the __metadata__ of its header does not map names to strings")
    return {name: _entry(uri, name, value) for name, value in header.items()}


def _entry(uri: str, name: str, value: Any) -> _Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(uri, f"{name} is not described by dtype, shape and data_offsets")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise _damaged(uri, f"{name} has dtype {value['dtype']!r}; known: {', '.join(DTYPES)}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise _damaged(uri, f"{name} has shape {shape!r} and data_offsets {offsets!r}; both are lists of counts")
    first, end = offsets
    if prod(max(size, 1) for size in shape) > _MOST_ELEMENTS:
        raise _damaged(uri, f"{name} has shape {shape!r}, more than any tensor")
    expected = prod(shape) * dtype.itemsize
    if end - first != expected:
        raise _damaged(
            uri, f"{name} has {end - first} bytes, but its shape {shape} of {value['dtype']} takes {expected}"
        )
    return _Entry(dtype, tuple(shape), first, end)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _check_layout(uri: str, header: dict[str, _Entry], *, num_bytes: int) -> None:
    """Tensors fill the bytes behind the header without gap or overlap, as the format asks."""
    at = 0
    for name, entry in sorted(header.items(), key=lambda item: (item[1].first, item[1].end)):
        if entry.first != at:
            raise _damaged(
                uri, f"{name} starts at byte {entry.first} behind the header, and the one before ends at {at}"
            )
        at = entry.end
    if at != num_bytes:
        cut = "it is cut short" if at > num_bytes else "bytes were added"
        raise _damaged(uri, f"its tensors take {at} bytes behind the header, and it has {num_bytes}: {cut}")


def _damaged(uri: str, detail: str) -> ModelError:
    return ModelError(f"{uri} is damaged: {detail}. Fix: copy or download the file again")


class _DiskBytes:
    """A local file, kept open: who replaces it meanwhile does not change what is read."""

    def __init__(self, path: str):
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelError(f"{path} cannot be opened: {error.strerror}") from None
        weakref.finalize(self, os.close, self._descriptor)
        self._path, self.size = path, os.fstat(self._descriptor).st_size

    def read_into(self, first: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            got = os.preadv(self._descriptor, [out[done : done + _PREADV_BYTES]], first + done)
            if not got:
                raise _damaged(self._path, f"it ends at byte {first + done}: it was cut while it was read")
            done += got


class _S3Bytes:
    """An S3 object as it was when opened; a read after it changed is refused."""

    def __init__(self, uri: str):
        from botocore.exceptions import BotoCoreError, ClientError

        bucket, _, key = uri.removeprefix("s3://").partition("/")
        try:
            found = storage.s3_client().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
        except (BotoCoreError, ClientError) as error:
            raise ModelError(f"{uri} cannot be opened: {error}") from error
        if not found or found[0]["Key"] != key:  # the key itself sorts before all that it begins
            raise ModelError(f"{uri} cannot be opened: there is no such object")
        self._uri, self._etag, self.size = uri, found[0]["ETag"], found[0]["Size"]

    def read_into(self, first: int, out: memoryview) -> None:
        if len(out):
            last = first + len(out) - 1
            out[:] = get_range(Range(uri=self._uri, size=self.size, etag=self._etag, first=first, last=last))
