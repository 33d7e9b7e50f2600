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
from functools import lru_cache
from pathlib import Path
from typing import Any

from posttrain import faults
from posttrain.errors import CheckpointError
from posttrain.manifest import MANIFEST, verify_folder, write_manifest


def is_s3(uri: str) -> bool:
    """Whether a URI names an object store rather than this machine's file system."""
    return uri.startswith("s3://")


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
        client, bucket, prefix = _s3(uri)
        for name in [*manifest["files"], MANIFEST]:  # the manifest last: it is the commit
            client.upload_file(str(Path(local, name)), bucket, f"{prefix}/{name}")
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
    """The objects below an s3:// prefix that end in one of `suffixes`, in a new local folder; nothing is verified."""
    client, bucket, prefix = _s3(uri)
    local = Path(tempfile.mkdtemp(prefix="posttrain-"))
    for key in _keys(client, bucket, f"{prefix}/"):
        if not key.endswith(suffixes):
            continue
        target = local / key[len(prefix) + 1 :]
        target.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(bucket, key, str(target))
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
    from botocore.exceptions import ClientError

    client, bucket, key = _s3(uri)
    try:
        client.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
            return False
        raise
    return True


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly below `uri`, sorted; none when it does not exist."""
    if not is_s3(uri):
        return sorted(p.name for p in Path(uri).iterdir() if p.is_dir()) if Path(uri).is_dir() else []
    client, bucket, prefix = _s3(uri)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/", Delimiter="/")
    return sorted(p["Prefix"].rstrip("/").rsplit("/", 1)[1] for page in pages for p in page.get("CommonPrefixes", []))


def remove_folder(uri: str) -> None:
    """Delete a folder; its manifest first, so that no reader takes a half-deleted one for whole."""
    if not is_s3(uri):
        Path(uri, MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(uri)
        return
    client, bucket, prefix = _s3(uri)
    client.delete_object(Bucket=bucket, Key=f"{prefix}/{MANIFEST}")
    for key in _keys(client, bucket, f"{prefix}/"):
        client.delete_object(Bucket=bucket, Key=key)


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
    client, bucket, key = _s3(uri)
    return client.get_object(Bucket=bucket, Key=key)["Body"].read()


def write_bytes(uri: str, data: bytes) -> None:
    """Replace one file whole: readers see the old bytes or the new."""
    if is_s3(uri):
        client, bucket, key = _s3(uri)
        client.put_object(Bucket=bucket, Key=key, Body=data)
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
    client, bucket, key = _s3(uri)
    client.delete_object(Bucket=bucket, Key=key)


def s3_client(
    *, retries: int = 8, connect_timeout_s: float = 10, read_timeout_s: float = 30, connections: int = 10
) -> Any:
    """The boto3 S3 client of this process with these limits: made once, shared by all threads.

    `retries` are boto3's own, 8 for a budget of minutes, not Metaflow's possible 80; 0 leaves them to the caller.
    """
    aws = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    endpoint = os.environ.get("METAFLOW_S3_ENDPOINT_URL")  # as Metaflow's own datastore; boto3 reads AWS_* itself
    return _client(os.getpid(), aws, endpoint, retries, connect_timeout_s, read_timeout_s, connections)


def _s3(uri: str) -> tuple[Any, str, str]:
    """Client, bucket, key."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return s3_client(), bucket, key.rstrip("/")


@lru_cache(maxsize=16)
def _client(
    _pid: int,
    _aws: tuple[tuple[str, str], ...],
    endpoint: str | None,
    retries: int,
    connect_timeout_s: float,
    read_timeout_s: float,
    connections: int,
) -> Any:
    """One client for each process, as sockets do not survive a fork, and for each state of boto3's environment."""
    from boto3.session import Session
    from botocore.config import Config

    config = Config(
        retries={"mode": "adaptive" if retries else "standard", "max_attempts": retries},
        connect_timeout=connect_timeout_s,
        read_timeout=read_timeout_s,
        max_pool_connections=connections,
    )
    # A session of its own: making clients from boto3's default session is not thread-safe.
    return Session().client("s3", config=config, endpoint_url=endpoint)


def _keys(client: Any, bucket: str, prefix: str) -> list[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


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
    _fsync(target.parent)


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
