"""S3 as this library calls it: one client a process, and calls that outlast a store's bad minutes.

What passes by itself (500, 503, a reset, a timeout, a cut body) is tried again with growing, jittered pauses
within a budget of seconds, because GPUs wait meanwhile; what does not (403, 404, a failed condition) is told
at once.
"""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from posttrain.errors import StorageError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How long one request may be repeated, seconds."""

    total_s: float = 300.0
    first_wait_s: float = 0.1
    """Doubled after every attempt, and shortened at random so that callers do not return together."""
    longest_wait_s: float = 5.0


BUDGET = Budget()


def place(uri: str) -> tuple[str, str]:
    """Bucket and key of an s3:// URI."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key.rstrip("/")


def patiently(what: str, request: Callable[[Any], T]) -> T:
    """request(client), repeated while its failure is one that passes by itself.

    Raises:
        StorageError: the budget is spent; names `what` and the last cause.
        botocore.exceptions.ClientError: the store's answer is final.
    """
    started, wait_s, attempts = time.monotonic(), BUDGET.first_wait_s, 0
    while True:
        attempts += 1
        try:
            return request(s3_client(retries=0, connections=64))
        except passing_errors() as error:
            cause = error
        except Exception as error:
            if not passes(error):
                raise
            cause = error
        pause_s = wait_s * _JITTER.uniform(0.5, 1.0)
        wait_s = min(wait_s * 2, BUDGET.longest_wait_s)
        spent_s = time.monotonic() - started
        if spent_s + pause_s > BUDGET.total_s:
            raise StorageError(
                f"{what}: given up after {attempts} attempts and {spent_s:.0f} s; the last: {cause}. "
                "Fix: see that the store is up and reachable from this machine, then resume the run"
            ) from cause
        time.sleep(pause_s)


def get_object(uri: str, span: range | None = None) -> tuple[bytes, str]:
    """An object's bytes, or those of `span`, and its ETag."""
    bucket, key = place(uri)
    part = {} if span is None else {"Range": f"bytes={span.start}-{span.stop - 1}"}

    def request(client):
        answer = client.get_object(Bucket=bucket, Key=key, **part)
        return answer["Body"].read(), answer["ETag"]

    return patiently(f"reading {uri}", request)


def put_object(uri: str, data: bytes, *, replaces: str | None = None) -> bool:
    """Write an object only if it does not exist, or only over the version with ETag `replaces`; whether it was done.

    A repeated request that the store had carried out the first time is recognised by the object's bytes.
    """
    bucket, key = place(uri)
    condition = {"IfNoneMatch": "*"} if replaces is None else {"IfMatch": replaces}

    def request(client):
        client.put_object(Bucket=bucket, Key=key, Body=data, **condition)

    try:
        patiently(f"writing {uri}", request)
    except Exception as error:
        if code_of(error) not in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"):
            raise
        try:
            return get_object(uri)[0] == data
        except Exception as absent:
            if code_of(absent) != "NoSuchKey":
                raise
            return False
    return True


def code_of(error: Exception) -> str:
    """The store's own code of a ClientError, or ""."""
    return getattr(error, "response", {}).get("Error", {}).get("Code", "")


def passes(error: Exception) -> bool:
    """Whether an answer of the store, or of boto3's transfers, is one where another attempt may do better."""
    cause = error.__context__ if "Failed" in type(error).__name__ else None  # S3UploadFailedError hides the answer
    response = getattr(error, "response", None) or getattr(cause, "response", {})
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = response.get("Error", {}).get("Code", "")
    return status >= 500 or status in (408, 429) or code in PASSING_CODES or isinstance(cause, passing_errors())


PASSING_CODES = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded"}
_JITTER = random.SystemRandom()  # not the global generator, whose state may belong to training


def passing_errors() -> tuple[type[Exception], ...]:
    """Faults of the way to the store; a failed body comes as urllib3's own."""
    import urllib3.exceptions
    from botocore import exceptions

    return (
        ConnectionError,
        TimeoutError,
        urllib3.exceptions.HTTPError,
        exceptions.ConnectionError,
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
        exceptions.CredentialRetrievalError,
        exceptions.FlexibleChecksumError,
    )


def s3_client(
    *, retries: int = 8, connect_timeout_s: float = 10, read_timeout_s: float = 30, connections: int = 10
) -> Any:
    """The boto3 S3 client of this process with these limits: made once, shared by all threads.

    `retries` are boto3's own, 8 for a budget of minutes, not Metaflow's possible 80; 0 leaves them to the caller.
    """
    aws = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    endpoint = os.environ.get("METAFLOW_S3_ENDPOINT_URL")  # as Metaflow's own datastore; boto3 reads AWS_* itself
    return _client(os.getpid(), aws, endpoint, retries, connect_timeout_s, read_timeout_s, connections)


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
