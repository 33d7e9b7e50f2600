"""verl's worker groups behind ActorGroup: the same answers, deadlines and reports as on Ray's own actors."""

import asyncio
import os
import socket

import pytest

from plain_actors import Unstartable, Worker
from posttrain.compute.cluster import Gang, ray_cluster
from posttrain.compute.pool import Pool
from posttrain.compute.verl_workers import verl_is_installed
from posttrain.compute.workers import ActorGroup
from posttrain.errors import ComputeError, DataError, WorkerDiedError

pytestmark = pytest.mark.skipif(not verl_is_installed(), reason="verl is not installed: make test-verl")
POOL = Pool(orchestrator="verl", threads=3, placement="SPREAD")


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster(Gang(), num_cpus=6, num_gpus=0):
        yield


@pytest.fixture(scope="module")
def group(cluster):
    made = ActorGroup("worker", Worker, [{"rank": 0}, {"rank": 1}], POOL)
    yield made
    made.kill()


@pytest.fixture
def mortal(cluster):
    made = ActorGroup("worker", Worker, [{"rank": 0}, {"rank": 1}], POOL)
    asyncio.run(made.call("pid", timeout_s=120))
    yield made
    made.kill()


def test_the_workers_are_verls(group: ActorGroup):
    from verl.single_controller.ray import RayWorkerGroup  # pyright: ignore[reportMissingImports]

    assert isinstance(group.members.group, RayWorkerGroup)
    assert group.members.group.world_size == len(group) == 2


def test_calls_are_dealt_in_rank_order(group: ActorGroup):
    assert asyncio.run(group.call("add", 10, timeout_s=120)) == [10, 11]
    assert asyncio.run(group.call_each("add", [((1,), {}), ((2,), {})], timeout_s=60)) == [1, 3]
    assert asyncio.run(group.call_one(1, "add", 5, timeout_s=60)) == 6
    assert asyncio.run(group.call("add", timeout_s=60, number=3)) == [3, 4]


def test_a_list_is_an_argument_like_any_other(group: ActorGroup):
    with pytest.raises(ComputeError, match="TypeError"):  # a list plus a rank: it was not dealt out by its elements
        asyncio.run(group.call("add", [7, 7], timeout_s=60))


def test_a_handle_of_another_groups_result_arrives_as_the_result(group: ActorGroup):
    handle = group.start(1, "add", 4)
    assert asyncio.run(group.call("add", handle, timeout_s=60)) == [5, 6]


def test_workers_have_their_threads_and_see_no_gpus(group: ActorGroup):
    pids = asyncio.run(group.call("pid", timeout_s=60))
    assert len({*pids, os.getpid()}) == 3
    assert asyncio.run(group.call("threads", timeout_s=60)) == ["3", "3"]
    assert asyncio.run(group.call("sees_gpus", timeout_s=60)) == ["", ""]


def test_errors_are_named_as_on_rays_own_actors(group: ActorGroup):
    with pytest.raises(DataError, match="row 7 is empty"):
        asyncio.run(group.call("refuse", timeout_s=60))
    with pytest.raises(ComputeError, match=r"worker 1: fail\(\) raised ZeroDivisionError: oops"):
        asyncio.run(group.call_one(1, "fail", timeout_s=60))


@pytest.mark.parametrize(
    "method, says, last",
    [
        ("die", "worker 1 died during die()", "about to load shard 7"),
        ("sleep", "worker 1: sleep() did not finish within 2 s", "waiting for a lock"),
    ],
)
def test_a_dead_or_hung_worker_is_named_with_its_log(mortal: ActorGroup, method: str, says: str, last: str):
    (pid,) = asyncio.run(mortal.call("pid", timeout_s=60))[1:]
    with pytest.raises(ComputeError) as caught:
        asyncio.run(mortal.call_one(1, method, timeout_s=2))
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(says) and first.endswith(f"[host {socket.gethostname()}, pid {pid}]")
    assert f"    {last}" in rest


def test_a_death_is_blamed_and_not_what_it_caused(mortal: ActorGroup):
    with pytest.raises(WorkerDiedError, match="worker 1 died"):
        asyncio.run(mortal.call("rank_1_dies_and_the_others_fail", timeout_s=60))


def test_a_worker_that_cannot_start_says_why(cluster):
    group = ActorGroup("worker", Unstartable, [{}], POOL)
    with pytest.raises(ComputeError, match=r"worker 0 died during pid\(\): MemoryError: no room"):
        asyncio.run(group.call("pid", timeout_s=120))
    group.kill()
