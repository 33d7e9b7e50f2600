"""One writer at a time: a living second one is refused, a dead one holds nobody up, a paused one cannot commit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain import storage
from posttrain.compute.lease import Lease
from posttrain.errors import CheckpointError
from saves import assert_is, checkpoints, reports_of, save_alone, state, tensors

TESTS = Path(__file__).parents[2]

HOLD = """
import os, sys, time
from posttrain.compute.lease import Lease
lease = Lease(sys.argv[1], renew_s=0.05, expire_s=60)
lease.acquire()
print(lease.token, flush=True)
sys.stdin.read(1)
try:
    with lease.committing():
        print("committed", flush=True)
except Exception as error:
    print(error, flush=True)
"""


@pytest.fixture
def holder(root_uri):
    """A process that holds the lease, and commits once it is sent a byte."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, root_uri],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "1\n"
    yield process
    process.kill()
    process.wait()


def lease(uri, **times) -> Lease:
    return Lease(uri, **({"renew_s": 0.05, "expire_s": 20.0} | times))


@pytest.mark.fault("F15", outcome="REFUSE")
def test_a_living_second_writer_is_refused_and_told_who_writes(root_uri, holder):
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=rf"is being written by process {holder.pid} on \S+, under lease 1\."):
        lease(root_uri).acquire()
    assert time.monotonic() - start < 15, "a sign of life is enough"
    holder.communicate("x")


@pytest.mark.fault("F15", outcome="CONTINUE")
def test_a_killed_writer_of_this_machine_holds_nobody_up(root_uri, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    mine = lease(root_uri, expire_s=3600)
    mine.acquire()
    assert mine.token == 2
    mine.release()


@pytest.mark.fault("F15", outcome="STOP")
def test_a_paused_writer_is_overtaken_and_cannot_commit(root_uri, holder):
    os.kill(holder.pid, signal.SIGSTOP)
    mine = lease(root_uri, expire_s=0.5)
    mine.acquire()
    assert mine.token == 2
    os.kill(holder.pid, signal.SIGCONT)
    said, _ = holder.communicate("x")
    assert f"was taken over by process {os.getpid()}" in said and "may not commit" in said
    with mine.committing():
        pass
    mine.release()


def test_a_released_lease_is_free_at_once_and_its_token_grows(root_uri):
    for token in (1, 2, 3):
        mine = lease(root_uri, expire_s=3600)
        mine.acquire()
        assert mine.token == token
        mine.release()


def test_a_damaged_lease_is_not_taken_for_a_free_one(root_uri):
    storage.write_bytes(f"{root_uri}/lease.json", b"{")
    with pytest.raises(CheckpointError, match=r"lease\.json is damaged"):
        lease(root_uri).acquire()


def test_an_overtaken_writer_cannot_commit_a_checkpoint_and_the_next_one_can(root_uri):
    first = checkpoints(root_uri)
    first.lease = lease(root_uri, renew_s=3600)
    first.lease.acquire()
    attempt = first.begin(1, 1)
    reports = reports_of(tensors(1), attempt.folder)
    second = checkpoints(root_uri)
    second.lease = lease(root_uri, expire_s=0.2)
    second.lease.acquire()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors(1).items()}
    with pytest.raises(CheckpointError, match="may not commit"):
        first.commit(attempt, shapes=shapes, reports=reports, state=state(1))
    assert second.latest() is None
    second.lease.release()
    first.lease.release()
    save_alone(root_uri, 1)
    assert_is(checkpoints(root_uri).latest(), 1)


def test_what_an_overtaken_writer_put_on_s3_in_the_last_moment_is_replaced(s3_bucket):
    uri = f"{s3_bucket}/c"
    save_alone(uri, 1)
    with checkpoints(uri).writing() as saved:
        assert saved.lease.token == 2
        attempt = saved.begin(1, 1)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors(5).items()}
        saved.commit(attempt, shapes=shapes, reports=reports_of(tensors(5), attempt.folder), state=state(5))
    assert checkpoints(uri).latest().state == state(5)
