"""Fixtures of tests that start flows: Metaflow's files in a folder of the test, and S3 with AWS Batch as the cloud."""

import os

import pytest

from deploy import foreign, settings


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Metaflow's files in tmp_path, whatever this machine's own configuration says."""
    for name in [name for name in os.environ if foreign(name)]:
        monkeypatch.delenv(name)
    for name, value in settings(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.fixture
def cloud(home, s3_bucket, monkeypatch):
    """S3 and AWS Batch behind one address; yields the bucket that is also Metaflow's datastore."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", os.environ["METAFLOW_S3_ENDPOINT_URL"])
    monkeypatch.setenv("METAFLOW_DEFAULT_DATASTORE", "s3")
    monkeypatch.setenv("METAFLOW_DATASTORE_SYSROOT_S3", f"{s3_bucket}/metaflow")
    return s3_bucket
