"""`posttrain doctor`: what is well and what needs a fix, a line each, on this machine or a broken one."""

import json
import shutil
from collections import namedtuple
from importlib import metadata

import pytest
from typer.testing import CliRunner

from posttrain.cli import app
from steps import doctor
from steps.doctor import examine
from steps.init import init

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def well(tmp_path, monkeypatch):
    """A machine without Metaflow settings, in an empty folder."""
    for name in ("METAFLOW_DEFAULT_DATASTORE", "METAFLOW_DATASTORE_SYSROOT_S3", "METAFLOW_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("METAFLOW_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(name, root="runs"):
    return next(found for found in examine(str(root)) if found.name == name)


def test_every_core_package_is_checked_by_the_range_it_was_installed_with(well):
    found = {each.name for each in examine("runs")}
    core = {
        line.split(";")[0].split(">")[0].split("<")[0].strip()
        for line in metadata.requires("posttrain")
        if ";" not in line
    }
    assert core <= found and {"python", "vllm", "kubernetes", "disk", "datastore"} <= found


def test_a_package_out_of_range_or_missing_is_told_with_the_command_that_mends_it(well, monkeypatch):
    real = metadata.version

    def version(name):
        if name == "ray":
            raise metadata.PackageNotFoundError(name)
        return "4.57.0" if name == "transformers" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    assert check("transformers").fix == "pip install 'transformers<5.20,>=5.16'"
    assert check("ray").found == "not installed" and check("ray").fix.startswith("pip install 'ray")


def test_a_small_disk_and_a_small_shared_memory_need_a_fix(well, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 64 << 20))
    assert "wants 10 GiB" in check("disk").fix and "--shm-size" in check("/dev/shm").fix


def test_a_root_on_s3_is_written_read_and_deleted(well, s3_bucket):
    import os

    import boto3

    found = check("s3", f"{s3_bucket}/runs")
    assert not found.fix and found.found.endswith("written, read, deleted")
    client = boto3.client("s3", endpoint_url=os.environ["METAFLOW_S3_ENDPOINT_URL"])
    assert client.list_objects_v2(Bucket=s3_bucket.removeprefix("s3://"))["KeyCount"] == 0


def test_a_bucket_that_is_not_there_needs_a_fix(well, s3_bucket):
    found = check("s3", "s3://no-such-bucket/runs")
    assert "NoSuchBucket" in found.found and "AWS_*" in found.fix


def test_metaflow_on_s3_without_a_place_needs_a_fix(well, monkeypatch):
    (well / "home").mkdir()
    (well / "home" / "config.json").write_text(json.dumps({"METAFLOW_DEFAULT_DATASTORE": "s3"}))
    assert check("datastore").fix.startswith("set METAFLOW_DATASTORE_SYSROOT_S3")
    monkeypatch.setenv("METAFLOW_DATASTORE_SYSROOT_S3", "s3://bucket/metaflow")
    assert check("datastore").found == "Metaflow's, s3: s3://bucket/metaflow" and not check("datastore").fix


def test_copied_flows_of_another_posttrain_are_told(well, monkeypatch):
    init("sft", well / "mine")
    monkeypatch.chdir(well / "mine")
    assert check("flows").found == "as in the installed posttrain"
    with open("flows/base.py", "a") as file:
        file.write("# of an earlier release\n")
    assert check("flows").found.startswith("base.py not as in") and check("flows").fix


def test_the_command_prints_json_and_its_status_is_the_verdict(well, monkeypatch):
    shown = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(shown.stdout)
    assert {"name", "found", "fix"} == set(found[0]) and shown.exit_code == int(any(each["fix"] for each in found))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 64 << 20))
    shown = CliRunner().invoke(app, ["doctor"])
    assert shown.exit_code == 1 and "fix  /dev/shm" in shown.stdout
