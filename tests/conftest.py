"""Fixtures that every test may ask for: an S3 bucket behind a real HTTP server, and a place on disk or S3."""

import os
import time
from contextlib import contextmanager
from uuid import uuid4

import pytest
from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # no test is timed
settings.load_profile("any machine")
settings.register_profile("long", max_examples=20_000, deadline=None, print_blob=True)
"""`pytest --hypothesis-profile long tests/fuzz` looks for as long as a night has."""

# Ray reads it when it is imported, which a test may do before the first that brings a cluster up (compute/cluster.py).
os.environ["RAY_AUTH_MODE"] = "token"


def pytest_collection_modifyitems(items):
    """Reports of a marked test say so, also those that come from another process (benchmarks/reliability.py)."""
    for item in items:
        if item.get_closest_marker("fault"):
            item.user_properties.append(("fault", True))


@pytest.fixture
def noticed(record_property):
    """A context in which a fault is made and noticed: its seconds go to the scorecard."""

    @contextmanager
    def timed():
        start = time.monotonic()
        try:
            yield
        finally:
            record_property("detected_s", time.monotonic() - start)

    return timed


@pytest.fixture(scope="session")
def s3_server():
    """Address of an S3 protocol server of this test session, on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_server, monkeypatch):
    """An empty bucket, "s3://<bucket>"; this process and its children find the server in their environment."""
    import boto3

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("METAFLOW_S3_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("NO_PROXY", ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"])))
    bucket = f"bucket-{uuid4().hex}"
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture(params=["disk", "s3"])
def root_uri(request, tmp_path):
    """A URI under which nothing is written yet: a test that asks for it runs on disk and again on S3."""
    if request.param == "disk":
        return str(tmp_path / "root")
    return request.getfixturevalue("s3_bucket") + "/root"


@pytest.fixture(scope="module")
def one_proxy(s3_server):
    """A proxy before the S3 server, for all tests of a file."""
    from faulty_s3 import FaultyS3

    with FaultyS3(s3_server) as proxy:
        yield proxy


@pytest.fixture
def proxy(s3_bucket, one_proxy, monkeypatch):
    """The way to the S3 server for this test: it can be told to break GETs, and logs those that reach the store."""
    monkeypatch.setenv("METAFLOW_S3_ENDPOINT_URL", one_proxy.address)
    one_proxy.reset()
    return one_proxy
