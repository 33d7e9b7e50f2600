"""Folders of bytes on a local disk or on S3, behind one small surface.

A URI is an absolute path or `s3://bucket/prefix`. A folder is published whole: on disk
by a rename, on S3 by writing its manifest last; readers look only at published folders.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain import faults, s3
from posttrain.errors import CheckpointError
from posttrain.manifest import MANIFEST, is_inside, verify_folder, write_manifest

s3_client = s3.s3_client


def is_s3(uri: str) -> bool:
    """Whether a URI names an object store rather than this machine's file system."""
    return uri.startswith("s3://")


def absolute(path: str) -> str:
    """The URI of what a person typed: a path of the working directory, or s3://."""
    return path.rstrip("/") if is_s3(path) else str(Path(path).expanduser().resolve())


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI."""
    return "/".join([uri.rstrip("/"), *parts])


def publish(local: str | Path, uri: str, **facts: Any) -> None:
    """Commit the files of a local folder as the folder `uri`, with a manifest of their hashes and `facts`.

    On disk `local` is moved, so it must be on the same file system (see staging()). A
    published folder is never overwritten.

    Raises:
        CheckpointError: `uri` is already published.
    """
    if exists(join(uri, MANIFEST)):
        raise CheckpointError(f"{uri} is already published; a published folder is never overwritten")
    faults.point("publish.before_manifest")
    manifest = write_manifest(local, **facts)
    faults.point("publish.before_commit")
    if is_s3(uri):
        for name in [*manifest["files"], MANIFEST]:  # the manifest last: it is the commit
            _upload(Path(local, name), join(uri, name))
        shutil.rmtree(local)
    else:
        _move(Path(local), Path(uri))
    faults.point("publish.after_commit")


@contextmanager
def staging(uri: str) -> Iterator[Path]:
    """An empty local folder to fill and publish as `uri`; removed if it is not published."""
    if is_s3(uri):
        folder = Path(tempfile.mkdtemp(prefix="posttrain-"))
    else:
        folder = Path(f"{uri}.tmp-{uuid.uuid4().hex[:12]}")
        folder.mkdir(parents=True)  # not mkdtemp: others may read what is published, as the umask says
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def ensure_folder(uri: str, fill: Callable[[Path], dict[str, Any] | None]) -> None:
    """Publish what `fill` writes into an empty folder, and the facts it returns, unless `uri` is published already.

    For outputs that depend on the run's config alone, so that a repeated step keeps them.
    """
    if exists(join(uri, MANIFEST)):
        return
    with staging(uri) as folder:
        facts = fill(folder)
        publish(folder, uri, **facts or {})


def fetch(uri: str) -> Path:
    """A local, verified copy of a published folder; the folder itself when it is on disk.

    Raises:
        CheckpointError: not published, or a file differs from the manifest.
    """
    if not is_s3(uri):
        verify_folder(uri)
        return Path(uri)
    local = download(uri)
    verify_folder(local, shown_as=uri)
    return local


def download(uri: str, *, suffixes: tuple[str, ...] = ("",)) -> Path:
    """The objects below an s3:// prefix that end in one of `suffixes`, in a new local folder; nothing is verified.

    Raises:
        CheckpointError: the key of an object would lie outside of that folder.
    """
    bucket, prefix = s3.place(uri)
    local = Path(tempfile.mkdtemp(prefix="posttrain-"))
    for key in _keys(bucket, f"{prefix}/"):
        if not key.endswith(suffixes):
            continue
        relative = key[len(prefix) + 1 :]
        if not is_inside(relative):
            raise CheckpointError(f"s3://{bucket}/{key} would be written outside of its folder; remove that object")
        target = local / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(bucket, key, target)
    return local


def manifest_of(uri: str) -> dict[str, Any]:
    """The manifest of a published folder, its files unread.

    Raises:
        CheckpointError: not published.
    """
    if not exists(join(uri, MANIFEST)):
        raise CheckpointError(f"{uri} is not published: it has no {MANIFEST}")
    return json.loads(read_bytes(join(uri, MANIFEST)))


def exists(uri: str) -> bool:
    """Whether a file exists."""
    if not is_s3(uri):
        return Path(uri).is_file()
    return size_of(uri) is not None


def size_of(uri: str) -> int | None:
    """Bytes of a file; None when there is none."""
    if not is_s3(uri):
        return Path(uri).stat().st_size if Path(uri).is_file() else None
    bucket, key = s3.place(uri)
    try:
        return s3.patiently(f"looking for {uri}", lambda c: c.head_object(Bucket=bucket, Key=key))["ContentLength"]
    except Exception as error:
        if s3.code_of(error) in ("404", "NoSuchKey", "NotFound"):
            return None
        raise


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly below `uri`, sorted; none when it does not exist."""
    if not is_s3(uri):
        return sorted(p.name for p in Path(uri).iterdir() if p.is_dir()) if Path(uri).is_dir() else []
    bucket, prefix = s3.place(uri)
    pages = _pages(Bucket=bucket, Prefix=f"{prefix}/", Delimiter="/")
    return sorted(p["Prefix"].rstrip("/").rsplit("/", 1)[1] for page in pages for p in page.get("CommonPrefixes", []))


def remove_folder(uri: str) -> None:
    """Delete a folder; its manifest first, so that no reader takes a half-deleted one for whole."""
    if not is_s3(uri):
        Path(uri, MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(uri)
        return
    bucket, prefix = s3.place(uri)
    remove_file(join(uri, MANIFEST))
    for key in _keys(bucket, f"{prefix}/"):
        remove_file(f"s3://{bucket}/{key}")


def set_aside(uri: str) -> str:
    """Make a damaged folder count as unpublished, and say where its bytes are now.

    On disk the folder is renamed; on S3 only its manifest is, and the next publish may write over the rest.
    """
    mark = f"damaged-{uuid.uuid4().hex[:12]}"
    if not is_s3(uri):
        return str(Path(uri).rename(f"{uri}.{mark}"))
    manifest = join(uri, MANIFEST)
    if exists(manifest):
        write_bytes(f"{manifest}.{mark}", read_bytes(manifest))
        remove_file(manifest)
    return uri


def read_bytes(uri: str) -> bytes:
    """The bytes of one file."""
    if not is_s3(uri):
        return Path(uri).read_bytes()
    return s3.get_object(uri)[0]


def write_bytes(uri: str, data: bytes) -> None:
    """Replace one file whole: readers see the old bytes or the new."""
    if is_s3(uri):
        bucket, key = s3.place(uri)
        s3.patiently(f"writing {uri}", lambda client: client.put_object(Bucket=bucket, Key=key, Body=data))
        return
    path = Path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    part.write_bytes(data)
    os.replace(part, path)


def remove_file(uri: str) -> None:
    """Delete one file."""
    if not is_s3(uri):
        Path(uri).unlink()
        return
    bucket, key = s3.place(uri)
    s3.patiently(f"deleting {uri}", lambda client: client.delete_object(Bucket=bucket, Key=key))


def _upload(local: Path, uri: str) -> None:
    bucket, key = s3.place(uri)
    s3.patiently(f"writing {uri}", lambda client: client.upload_file(str(local), bucket, key))


def _download(bucket: str, key: str, target: Path) -> None:
    s3.patiently(f"reading s3://{bucket}/{key}", lambda client: client.download_file(bucket, key, str(target)))


def _pages(**query: Any) -> list[dict[str, Any]]:
    what = f"listing s3://{query['Bucket']}/{query['Prefix']}"
    return s3.patiently(what, lambda client: list(client.get_paginator("list_objects_v2").paginate(**query)))


def _keys(bucket: str, prefix: str) -> list[str]:
    return [entry["Key"] for page in _pages(Bucket=bucket, Prefix=prefix) for entry in page.get("Contents", [])]


def _move(local: Path, target: Path) -> None:
    """Commit by a rename, which fails where another writer has put files since."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(local, target)
    except OSError:
        if exists(str(target / MANIFEST)):
            raise CheckpointError(f"{target} is already published, by another writer, just now") from None
        if not target.exists():
            raise
        target.rename(f"{target}.stray-{uuid.uuid4().hex[:12]}")  # left by no publish: kept, out of the way
        os.rename(local, target)
    fsync(target.parent)


def fsync(path: str | Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
