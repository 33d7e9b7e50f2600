"""A range of bytes of one S3 object: whole and unchanged, or a DataError in bounded time.

In: an object as it was listed (uri, size, ETag) and a range. Out: its bytes. What passes by itself
(500, 503, a reset or refused connection, a timeout, a cut body) is tried again within a budget of
attempts and seconds; what does not (403, 404, an object overwritten since) is refused at once.
"""

import random
import threading
import time
from dataclasses import dataclass
from typing import Any

from posttrain import storage
from posttrain.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long one GET may take before the run is told; times in seconds."""

    attempts: int = 6
    first_wait_s: float = 0.1
    """Doubled after every attempt and shortened at random by up to half, so that readers do not return together."""
    longest_wait_s: float = 5.0
    deadline_s: float = 180.0
    """For all attempts together; a body that still drips is given up then."""
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 20.0
    """Between two arrivals of bytes."""


PATIENCE = Patience()


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Bytes `first` to `last`, both included, of an object with this size (bytes) and ETag."""

    uri: str
    size: int
    etag: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.uri}, bytes {self.first}-{self.last}"


def get_range(wanted: Range, *, patience: Patience = PATIENCE, stop: threading.Event | None = None) -> bytes:
    """The bytes of a range, [last - first + 1].

    Args:
        stop: set by who no longer wants the bytes; no new attempt is made then.

    Raises:
        DataError: refused, changed since it was listed, or the budget is spent; names the range and the last cause.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    started, wait_s, attempt = time.monotonic(), patience.first_wait_s, 0
    while True:
        attempt += 1
        try:
            return _get(wanted, patience, started + patience.deadline_s)
        except ClientError as error:
            if refusal := _refusal(error):
                raise DataError(f"{wanted}: {refusal}") from error
            cause = error
        except _passing_errors() as error:
            cause = error
        except BotoCoreError as error:
            raise DataError(f"{wanted}: {error}") from error
        pause_s = wait_s * _JITTER.uniform(0.5, 1.0)
        wait_s = min(wait_s * 2, patience.longest_wait_s)
        spent_s = time.monotonic() - started
        if attempt >= patience.attempts or spent_s + pause_s > patience.deadline_s:
            break
        if (stop or _NEVER).wait(pause_s):
            break
    raise DataError(
        f"{wanted}: not read after {attempt} of {patience.attempts} attempts and {spent_s:.1f} s; the last: {cause}. "
        "Fix: see that the store is up and reachable from this machine, then resume the run"
    ) from cause


_NEVER = threading.Event()
_JITTER = random.SystemRandom()  # not the global generator, whose state may belong to training
_CONNECTIONS = 64  # more than the threads that read at one time; idle ones cost nothing
_PIECE_BYTES = 256 * 1024
_PASSING_CODES = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded"}


class _BadAnswerError(Exception):
    """The answer is not the range that was asked for."""


def _get(wanted: Range, patience: Patience, ends: float) -> bytes:
    """One attempt."""
    client = storage.s3_client(
        retries=0,  # counted here, and a cut body is no error to boto3
        connect_timeout_s=patience.connect_timeout_s,
        read_timeout_s=patience.read_timeout_s,
        connections=_CONNECTIONS,
    )
    bucket, _, key = wanted.uri.removeprefix("s3://").partition("/")
    span = f"{wanted.first}-{wanted.last}"
    answer = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={span}", IfMatch=wanted.etag)
    with answer["Body"] as stream:
        if answer.get("ETag") != wanted.etag:  # a store that does not know If-Match
            raise DataError(f"{wanted}: {_CHANGED}")
        if answer.get("ContentRange") != f"bytes {span}/{wanted.size}":
            raise _BadAnswerError(f"the store sent range {answer.get('ContentRange')}")
        return _read(stream, wanted.last - wanted.first + 1, ends)


def _read(stream: Any, num_bytes: int, ends: float) -> bytes:
    read = getattr(stream, "read1", stream.read)  # read() of a dripping body may return after any deadline
    pieces, arrived = [], 0
    while piece := read(_PIECE_BYTES):
        pieces.append(piece)
        arrived += len(piece)
        if time.monotonic() > ends:
            raise _BadAnswerError(f"{arrived} of {num_bytes} bytes had come by the deadline")
    if arrived != num_bytes:
        raise _BadAnswerError(f"the body ended after {arrived} of {num_bytes} bytes")
    return b"".join(pieces)


_CHANGED = "changed since it was indexed. Fix: keep input files as they are, or start a new run over the new ones"


def _refusal(error: Any) -> str | None:
    """Why an answer of the store is final; None where another attempt may do better."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = error.response.get("Error", {}).get("Code", "")
    if status >= 500 or status in (408, 429) or code in _PASSING_CODES:
        return None
    if status in (412, 416):
        return _CHANGED
    if status == 404:
        return "is gone since it was indexed. Fix: put it back, or start a new run without it"
    return f"refused with {status} {code}. Fix: see that the credentials of this machine may read it"


def _passing_errors() -> tuple[type[Exception], ...]:
    """Faults of the way to the store; a failed body comes as urllib3's own."""
    import urllib3.exceptions
    from botocore import exceptions

    return (
        _BadAnswerError,
        OSError,
        urllib3.exceptions.HTTPError,
        exceptions.ConnectionError,
        exceptions.HTTPClientError,
        exceptions.CredentialRetrievalError,
        exceptions.FlexibleChecksumError,
    )
