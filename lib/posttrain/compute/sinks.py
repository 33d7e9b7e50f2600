"""Where the bytes of one shard go: a file that is fsynced, or a multipart upload whose parts outlast bad minutes."""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain import s3, storage
from posttrain.errors import StorageError

PART_BYTES = 32 * 1024 * 1024
MAX_PARTS = 9000
"""S3 allows 10,000."""
UPLOADS = 8
"""Parts of one shard that are under way at one time."""


class DiskSink:
    """A file, written in order; durable once close() returns."""

    def __init__(self, path: str):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  (closed by close() or abort())

    def write(self, data: memoryview) -> None:
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def abort(self) -> None:
        self._file.close()


class S3Sink:
    """One object, sent while it is written; it is there once close() returns, and not before."""

    def __init__(self, uri: str, num_bytes: int):
        self.uri, self.num_bytes = uri, num_bytes
        self._bucket, self._key = s3.place(uri)
        self._part_bytes = max(PART_BYTES, -(-num_bytes // MAX_PARTS))
        self._waiting: list[memoryview] = []
        self._upload_id: str | None = None
        self._pool = ThreadPoolExecutor(UPLOADS)
        self._parts: list[Future] = []

    def write(self, data: memoryview) -> None:
        self._waiting.append(data)
        if sum(each.nbytes for each in self._waiting) >= self._part_bytes:
            self._send()

    def close(self) -> None:
        if self._upload_id is None:
            storage.write_bytes(self.uri, b"".join(self._waiting))
            self._pool.shutdown()
            return
        if self._waiting:
            self._send()
        parts = [future.result() for future in self._parts]
        self._pool.shutdown()
        done = {"Bucket": self._bucket, "Key": self._key, "UploadId": self._upload_id}
        try:
            s3.patiently(
                f"writing {self.uri}",
                lambda client: client.complete_multipart_upload(**done, MultipartUpload={"Parts": parts}),
            )
        except Exception as error:  # a repeated request finds no upload where the first one had been carried out
            if s3.code_of(error) != "NoSuchUpload" or storage.size_of(self.uri) != self.num_bytes:
                raise

    def abort(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._upload_id is not None:
            ids = {"Bucket": self._bucket, "Key": self._key, "UploadId": self._upload_id}
            s3.s3_client(retries=0).abort_multipart_upload(**ids)

    def _send(self) -> None:
        if self._upload_id is None:
            made = s3.patiently(
                f"writing {self.uri}",
                lambda client: client.create_multipart_upload(Bucket=self._bucket, Key=self._key),
            )
            self._upload_id = made["UploadId"]
        if len(self._parts) >= UPLOADS:
            self._parts[-UPLOADS].result()  # no more of them in memory than are under way
        body, self._waiting = b"".join(self._waiting), []
        self._parts.append(self._pool.submit(self._send_part, len(self._parts) + 1, body))

    def _send_part(self, number: int, body: bytes) -> dict[str, Any]:
        ids = {"Bucket": self._bucket, "Key": self._key, "UploadId": self._upload_id, "PartNumber": number}
        answer = s3.patiently(f"writing {self.uri}, part {number}", lambda client: client.upload_part(**ids, Body=body))
        return {"PartNumber": number, "ETag": answer["ETag"]}


@contextmanager
def sink(uri: str, num_bytes: int) -> Iterator[DiskSink | S3Sink]:
    """Where to write a file of `num_bytes`; whole and durable at the end of the block.

    Raises:
        StorageError: the disk is full, or the store gave no answer within its budget.
    """
    try:
        made = S3Sink(uri, num_bytes) if storage.is_s3(uri) else DiskSink(uri)
        try:
            yield made
            made.close()
        except Exception:
            made.abort()
            raise
    except OSError as error:
        raise StorageError(f"{uri}: {error.strerror or error}") from error
