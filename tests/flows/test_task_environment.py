"""A task's environment: Metaflow's own store gives up within minutes while GPUs may be held, and what the config hands
on is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import boto3
import pytest

from deploy import ROOT, printed
from faulty_s3 import Fault

PROBE = Path(__file__).parent / "probe_flow.py"
BOUNDS = {
    "S3_RETRY_COUNT": 6,
    "S3_TRANSIENT_RETRY_COUNT": 6,
    "S3_CLIENT_RETRY_CONFIG": {"total_max_attempts": 2, "mode": "standard"},
}
READ = """
import json, sys, time
slept = []
time.sleep = slept.append
from metaflow import S3
from metaflow.plugins.datatools.s3.s3 import MetaflowS3Exception
try:
    with S3() as s3:
        s3.get(sys.argv[1])
except MetaflowS3Exception as error:
    print(json.dumps({"slept_s": sum(slept), "error": str(error)}))
"""
"""Metaflow reads a key; its pauses are added up and not waited for."""


def probed(home, *words: str) -> dict:
    """What the probe's task says of its environment."""
    text = printed(PROBE, [*words, "run"], home)
    return json.loads(text[text.index("PROBE ") + 6 :].splitlines()[0])


def test_a_task_on_this_machine_is_bounded(home):
    assert probed(home) == BOUNDS | {"POSTTRAIN_PROBE": None}


def test_what_a_person_has_set_holds(home, monkeypatch):
    monkeypatch.setenv("METAFLOW_S3_TRANSIENT_RETRY_COUNT", "12")
    (home / "home").mkdir()
    (home / "home" / "config.json").write_text(json.dumps({"METAFLOW_S3_RETRY_COUNT": "2"}))
    found = probed(home)
    assert (found["S3_RETRY_COUNT"], found["S3_TRANSIENT_RETRY_COUNT"]) == (2, 12)


@pytest.mark.slow
def test_variables_and_secrets_of_the_config_are_in_a_tasks_environment(cloud, home):
    boto3.client("secretsmanager").create_secret(Name="posttrain", SecretString='{"POSTTRAIN_PROBE": "from a secret"}')
    for decorators, value in (
        ({"all": {"secrets": {"sources": ["aws-secrets-manager.posttrain"]}}}, "from a secret"),
        ({"all": {"environment": {"vars": {"POSTTRAIN_PROBE": "plain"}}}}, "plain"),
    ):
        found = probed(home, "--config-value", f"parallel.decorators={json.dumps(decorators)}")
        assert found == BOUNDS | {"POSTTRAIN_PROBE": value}


def pauses(bucket: str, bounds: dict[str, str]) -> float:
    """Seconds that Metaflow would pause for on one key of a store that answers every request with 503."""
    env = os.environ | bounds
    command = [sys.executable, "-c", READ, f"{bucket}/key"]
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "S3 operation failed" in found["error"] and "/key" in found["error"]
    return found["slept_s"]


@pytest.mark.slow
def test_a_key_that_cannot_be_read_is_given_up_after_minutes(home, proxy, s3_bucket):
    sys.path.insert(0, str(ROOT / "flows"))
    from placement import S3_BOUNDS

    proxy.always, proxy.rate = Fault.SLOW_DOWN, 1.0
    assert 60 < pauses(s3_bucket, S3_BOUNDS) < 180
    once = {"METAFLOW_S3_CLIENT_RETRY_CONFIG": json.dumps({"total_max_attempts": 1, "mode": "standard"})}
    assert pauses(s3_bucket, once) > 70 * 60, "Metaflow bounds itself now: the bounds of flows/placement.py can go"
