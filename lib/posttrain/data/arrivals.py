"""Which files of a growing source came since someone last looked: a list of names and hashes, and what is not in it."""

from collections.abc import Mapping

from posttrain import storage
from posttrain.data.source import data_files
from posttrain.errors import DataError
from posttrain.manifest import file_sha256


def hashed_files(path: str, *, key: str) -> dict[str, str]:
    """The data files that a config's path names now -> what tells their contents.

    On disk the sha256 of the bytes. On S3 the ETag, for which no byte is read: the same bytes put again in other parts
    are another file.

    Args:
        path: as in data.sources: a file, a folder, a glob, local or s3://.
        key: where the config names it, for errors.

    Raises:
        DataError: nothing there.
    """
    try:
        files = data_files(path)
    except DataError as error:
        raise DataError(f"{key}: {error}") from None
    return {file.uri: file.version if storage.is_s3(file.uri) else file_sha256(file.uri) for file in files}


def arrived(now: Mapping[str, str], seen: Mapping[str, str]) -> list[str]:
    """The files whose name or contents were not seen, sorted by name."""
    return sorted(uri for uri, mark in now.items() if seen.get(uri) != mark)
