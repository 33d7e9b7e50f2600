"""Input files on disk or S3: which ones a path names, and random access to their bytes.

In: a file, a folder or a glob, local or `s3://`. Out: the files it names, each with the version that
the run was planned on, and an open seekable file that refuses to read another version.
"""

import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from posttrain import storage
from posttrain.data.chunk_cache import ChunkCache
from posttrain.data.ranged import RangedFile
from posttrain.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One immutable input file."""

    uri: str
    """Absolute path, or s3://bucket/key."""
    size: int
    """Bytes."""
    version: str
    """ETag on S3, mtime in ns on disk; only to notice that the file changed under a run."""


def list_files(uri: str, *, suffixes: tuple[str, ...]) -> list[File]:
    """The files that `uri` names and that end in one of `suffixes` (any case), sorted by uri.

    A folder stands for all files below it; in a glob, `*`, `?` and `[ab]` stay within one name and `**` spans
    folders. Names that start with "." or "_" are left out, as are folders so named, unless the glob spells that
    character. A name that exists as it is written is no glob.

    Raises:
        DataError: nothing matches, or the place cannot be listed.
    """
    found = list(_list_s3(uri) if storage.is_s3(uri) else _list_disk(uri))
    endings = tuple(suffix.lower() for suffix in suffixes)
    files = sorted((file for file in found if file.uri.lower().endswith(endings)), key=lambda file: file.uri)
    if files:
        return files
    others = f"; there are {len(found)} other files, as {found[0].uri}" if found else ""
    here = not found and not any(sign in uri for sign in "*?[") and (storage.is_s3(uri) or not os.path.exists(uri))
    raise DataError(
        f"{uri} {'does not exist' if here else 'holds no file that ends in ' + ', '.join(suffixes)}{others}. "
        "Fix: name an existing file, folder or glob (*, ?, [ab], **), on disk or s3://"
    )


def open_file(
    file: File, *, cache: ChunkCache | None = None, starts: Sequence[int] | None = None
) -> io.BufferedReader | RangedFile:
    """Open for reading and seeking; `cache` keeps what is read from S3. For pyarrow, wrap it in pa.PythonFile.

    Args:
        starts: where the ranges that S3 is asked for begin; None cuts the file evenly.

    Raises:
        DataError: gone, or changed since it was listed; on S3 the first read finds out.
    """
    if storage.is_s3(file.uri):
        return RangedFile(file.uri, size=file.size, etag=file.version, cache=cache, starts=starts)
    try:
        now = os.stat(file.uri)
        if (now.st_size, str(now.st_mtime_ns)) == (file.size, file.version):
            return open(file.uri, "rb")
    except OSError as error:
        raise DataError(f"{file.uri}: cannot be opened: {error.strerror}") from error
    raise DataError(
        f"{file.uri}: changed since it was indexed ({file.size} bytes then, {now.st_size} now). "
        "Fix: keep input files as they are, or start a new run over the new ones"
    )


def machine_cache() -> ChunkCache | None:
    """The cache of what is read from S3 that this machine's environment asks for: POSTTRAIN_CACHE names its folder,
    POSTTRAIN_CACHE_GIB bounds it (50 where it is not set). None without a folder.

    Raises:
        DataError: POSTTRAIN_CACHE_GIB is no positive number.
    """
    folder, gib = os.environ.get("POSTTRAIN_CACHE"), os.environ.get("POSTTRAIN_CACHE_GIB", "50")
    if not folder:
        return None
    try:
        size = float(gib) * 2**30
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise DataError(f"POSTTRAIN_CACHE_GIB is {gib!r}; give the cache in {folder} a size in GiB, as 50")
    return _cache(folder, int(size))


@lru_cache(maxsize=4)
def _cache(folder: str, max_bytes: int) -> ChunkCache:
    """One for all files of a process: it counts what it has written."""
    return ChunkCache(folder, max_bytes)


def _list_disk(uri: str) -> Iterator[File]:
    path = os.path.abspath(os.path.expanduser(uri))
    if os.path.isfile(path):
        yield _file_on_disk(path)
        return
    below, glob = (path.rstrip("/") + "/", "**/*") if os.path.isdir(path) else _split(path)
    wanted = _pattern(below, glob)
    for found in _walk(below, hidden=bool(_HIDDEN.search(glob)), depth=None if "**" in glob else glob.count("/")):
        if wanted.fullmatch(found):
            yield _file_on_disk(found)


def _walk(top: str, *, hidden: bool, depth: int | None) -> Iterator[str]:
    """Paths of all files below, links followed; each folder once, whatever links lead to it."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise DataError(f"{error.filename}: cannot be listed: {error.strerror}") from error

    seen = set()
    for folder, folders, names in os.walk(top, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        level = folder.rstrip("/").count("/") - top.rstrip("/").count("/")
        inside = depth is None or level < depth
        folders[:] = sorted(name for name in folders if inside and (hidden or name[0] not in "._"))
        yield from (os.path.join(folder, name) for name in names)


def _file_on_disk(path: str) -> File:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Fix: mend or remove the link") from error
    return File(uri=path, size=stat.st_size, version=str(stat.st_mtime_ns))


def _list_s3(uri: str) -> Iterator[File]:
    from botocore.exceptions import BotoCoreError, ClientError

    client = storage.s3_client()
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    try:
        first = client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
        if first and first[0]["Key"] == key and not key.endswith("/"):  # the first key of a prefix is the prefix
            yield _file_on_s3(bucket, first[0])
            return
        is_glob = _WILDCARD.search(key)
        below, glob = _split(key) if is_glob else (key.rstrip("/") + "/" if key else "", "**/*")
        wanted = _pattern(below, glob)
        prefix = key[: is_glob.start()] if is_glob else below
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", []):
                if wanted.fullmatch(entry["Key"]):
                    yield _file_on_s3(bucket, entry)
    except (BotoCoreError, ClientError) as error:
        raise DataError(f"{uri}: cannot be listed: {error}") from error


def _file_on_s3(bucket: str, entry: Any) -> File:
    return File(uri=f"s3://{bucket}/{entry['Key']}", size=entry["Size"], version=entry["ETag"])


_WILDCARD = re.compile(r"[*?\[]")
_HIDDEN = re.compile(r"(?:^|/)[._]")
_TOKEN = re.compile(r"\*\*/|\*+|\?|\[!?\]?[^\]/]*\]")
_VISIBLE = "(?![._])"


def _split(path: str) -> tuple[str, str]:
    """The folder before the first wildcard, with its slash, and the glob below it."""
    wildcard = _WILDCARD.search(path)
    start = path.rfind("/", 0, wildcard.start() if wildcard else None) + 1
    return path[:start], path[start:]


def _pattern(below: str, glob: str) -> re.Pattern[str]:
    """What a glob below a folder matches: a wildcard at the start of a name matches no hidden one."""
    parts, at = [re.escape(below)], 0
    for token in _TOKEN.finditer(glob):
        parts.append(re.escape(glob[at : token.start()]))
        starts_name = token.start() == 0 or glob[token.start() - 1] == "/"
        parts.append(_wildcard(token.group(), starts_name, ends=token.end() == len(glob)))
        at = token.end()
    try:
        return re.compile("".join([*parts, re.escape(glob[at:])]), re.DOTALL)
    except re.error as error:
        raise DataError(f"{below}{glob}: is not a glob: {error}. Fix: write a set as [abc] or [a-z]") from error


def _wildcard(token: str, starts_name: bool, ends: bool) -> str:
    folders = f"(?:{_VISIBLE}[^/]+/)*"
    if token == "**/" and starts_name:
        return folders
    if token == "**" and starts_name and ends:
        return f"{folders}{_VISIBLE}[^/]+"
    if token == "**/":
        return "[^/]*/"
    if token[0] == "[":
        chars = re.sub(r"([\\^\[\]&~|])", r"\\\1", token[1:-1].removeprefix("!"))
        inner = f"(?!/)[{'^' if token[1] == '!' else ''}{chars}]"
    else:
        inner = "[^/]" if token == "?" else "[^/]*"
    return (_VISIBLE if starts_name else "") + inner
