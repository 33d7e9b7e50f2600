"""Actors in processes of their own: dispatch, deadlines, deaths with a name, and nothing left behind."""

import asyncio
import os
import time

import psutil
import pytest

from actors import Worker
from posttrain.compute.cluster import Gang, ray_cluster
from posttrain.compute.workers import ActorGroup
from posttrain.errors import ComputeError, DataError


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster(Gang(), num_cpus=4, num_gpus=0) as driving:
        assert driving
        yield


@pytest.fixture
def group(cluster):
    made = ActorGroup("worker", Worker, [{"rank": 0}, {"rank": 1}], num_cpus=1, threads=3)
    yield made
    made.kill()


def test_call_returns_in_rank_order(group: ActorGroup):
    assert asyncio.run(group.call("add", 10, timeout_s=60)) == [10, 11]
    assert asyncio.run(group.call_each("add", [((1,), {}), ((2,), {})], timeout_s=60)) == [1, 3]
    assert asyncio.run(group.call_one(1, "add", 5, timeout_s=60)) == 6


def test_actors_live_in_processes_of_their_own_with_their_threads(group: ActorGroup):
    pids = asyncio.run(group.call("pid", timeout_s=60))
    assert len({*pids, os.getpid()}) == 3
    assert asyncio.run(group.call("threads", timeout_s=60)) == ["3", "3"]


def test_an_error_of_ours_comes_back_as_itself(group: ActorGroup):
    with pytest.raises(DataError, match="row 7 is empty"):
        asyncio.run(group.call("refuse", timeout_s=60))


def test_any_other_error_names_the_actor_and_the_cause(group: ActorGroup):
    with pytest.raises(ComputeError, match=r"worker 1: fail\(\) raised ZeroDivisionError: oops"):
        asyncio.run(group.call_one(1, "fail", timeout_s=60))


def test_a_timeout_that_the_work_raised_is_not_called_our_deadline(group: ActorGroup):
    with pytest.raises(ComputeError, match=r"raised TimeoutError: the verifier's own"):
        asyncio.run(group.call_one(1, "times_out_itself", timeout_s=60))


def test_an_actor_without_gpus_sees_none(group: ActorGroup):
    assert asyncio.run(group.call("sees_gpus", timeout_s=60)) == ["", ""]


def test_a_hang_ends_at_its_deadline_and_says_who(group: ActorGroup):
    start = time.monotonic()
    with pytest.raises(ComputeError, match=r"worker 0: sleep\(\) did not finish within 1 s"):
        asyncio.run(group.call_one(0, "sleep", timeout_s=1))
    assert time.monotonic() - start < 30


def test_a_killed_actor_is_named(group: ActorGroup):
    with pytest.raises(ComputeError, match=r"worker 1 died during die\(\)"):
        asyncio.run(group.call_one(1, "die", timeout_s=60))


def test_ray_listens_on_loopback_only(cluster):
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    sockets = [c for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN and c.pid in ours]
    assert sockets, "Ray is up and listens somewhere"
    assert {c.laddr.ip for c in sockets} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
