"""Actors in processes of their own: dispatch, deadlines, deaths with a name, and nothing left behind."""

import asyncio
import os
import socket
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from plain_actors import Crowded, Starved, Unstartable, Worker
from posttrain.compute.cluster import Gang, ray_cluster
from posttrain.compute.pool import SPINS, Pool, by_node, environment
from posttrain.compute.whereabouts import last_words, tail
from posttrain.compute.workers import ActorGroup
from posttrain.errors import ComputeError, DataError, WorkerDiedError


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster(Gang(), num_cpus=5, num_gpus=0) as driving:
        assert driving
        yield


@pytest.fixture(scope="module")
def group(cluster):
    """Two actors for all the tests that leave them as they were."""
    made = ActorGroup("worker", Worker, [{"rank": 0}, {"rank": 1}], Pool(threads=3))
    yield made
    made.kill()


@pytest.fixture
def mortal(cluster):
    """Two actors, up and of one test alone."""
    made = ActorGroup("worker", Worker, [{"rank": 0}, {"rank": 1}], Pool(cpus=0))
    asyncio.run(made.call("pid", timeout_s=60))
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


def test_a_hang_ends_at_its_deadline_and_says_who(mortal: ActorGroup):
    start = time.monotonic()
    with pytest.raises(ComputeError, match=r"worker 0: sleep\(\) did not finish within 1 s"):
        asyncio.run(mortal.call_one(0, "sleep", timeout_s=1))
    assert time.monotonic() - start < 30


@pytest.mark.fault("F1", outcome="STOP")
def test_a_killed_actor_is_named(mortal: ActorGroup, record_property):
    asyncio.run(mortal.call("pid", timeout_s=60))  # they are up
    start = time.monotonic()
    with pytest.raises(ComputeError, match=r"worker 1 died during die\(\)") as caught:
        asyncio.run(mortal.call_one(1, "die", timeout_s=60))
    record_property("detected_s", time.monotonic() - start)
    assert "out of host memory" not in str(caught.value)


@pytest.mark.parametrize("method, last", [("die", "about to load shard 7"), ("sleep", "waiting for a lock")])
def test_the_error_of_an_actor_names_host_and_process_and_shows_its_log(mortal: ActorGroup, method: str, last: str):
    (pid,) = asyncio.run(mortal.call("pid", timeout_s=60))[1:]
    with pytest.raises(ComputeError) as caught:
        asyncio.run(mortal.call_one(1, method, timeout_s=2))
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("worker 1") and first.endswith(f"[host {socket.gethostname()}, pid {pid}]")
    assert f"    {last}" in rest


@pytest.mark.fault("F11", outcome="STOP")
def test_a_death_for_want_of_memory_is_told_from_any_other(cluster, tmp_path, noticed):
    group = ActorGroup("worker", Starved, [{"rank": 0, "cgroups": str(tmp_path)}], Pool(cpus=0))
    asyncio.run(group.call("pid", timeout_s=60))
    message = r"worker 0 died[^\n]*\nout of host memory: .*oom_kill 0 -> 1"
    with noticed(), pytest.raises(WorkerDiedError, match=message):
        asyncio.run(group.call("take_too_much", timeout_s=60))
    group.kill()


@pytest.fixture
def crowded():
    """A memory cgroup of 128 MiB, which takes root."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        folder = Path(root, f"posttrain-{os.getpid()}")
        try:
            folder.mkdir()
            (folder / limit).write_text(str(128 << 20))
        except OSError:
            continue
        yield str(folder)
        for _ in range(100):  # the kernel takes a moment to let go of the dead
            with suppress(OSError):
                folder.rmdir()
                return
            time.sleep(0.1)
        folder.rmdir()
        return
    pytest.skip("memory cgroups cannot be made here")


@pytest.mark.fault("F11", outcome="STOP")
def test_a_process_that_the_kernel_killed_for_its_memory_is_told_so(cluster, crowded):
    group = ActorGroup("worker", Crowded, [{"rank": 0, "cgroup": crowded}], Pool(cpus=0))
    asyncio.run(group.call("pid", timeout_s=60))
    with pytest.raises(WorkerDiedError, match=r"worker 0 died[^\n]*\nout of host memory: .*oom_kill 0 -> 1"):
        asyncio.run(group.call("take_too_much", timeout_s=60))
    group.kill()


def test_an_actor_that_never_came_up_is_named_without_a_place(cluster):
    group = ActorGroup("worker", Unstartable, [{}], Pool(cpus=0))
    with pytest.raises(
        ComputeError, match=r"worker 0 died during pid\(\): MemoryError: no room for the model \[it never came up"
    ):
        asyncio.run(group.call("pid", timeout_s=60))


def test_a_death_is_blamed_and_not_what_it_caused(mortal: ActorGroup):
    with pytest.raises(WorkerDiedError, match="worker 1 died"):
        asyncio.run(mortal.call("rank_1_dies_and_the_others_fail", timeout_s=60))


def test_a_log_on_another_node_is_read_there(mortal: ActorGroup):
    with pytest.raises(ComputeError):
        asyncio.run(mortal.call_one(0, "sleep", timeout_s=1))
    where = mortal.where(0)
    assert where is not None
    assert "waiting for a lock" in last_words(replace(where, host="elsewhere"))
    gone = replace(where, host="elsewhere", node_id="0" * 56)
    assert "could not be read" in last_words(gone)


def test_a_log_is_cut_to_its_last_lines(tmp_path):
    (tmp_path / "empty").write_text(":job_id:01\n")
    (tmp_path / "full").write_text("".join(f"line {i}\n" for i in range(10_000)))
    lines = tail([str(tmp_path / "empty"), str(tmp_path / "full")]).splitlines()
    assert lines[1:] == [f"    line {i}" for i in range(9_980, 10_000)]


def test_a_group_reserves_its_places_together_and_gives_them_back(cluster):
    import ray

    before = ray.available_resources()["CPU"]
    group = ActorGroup("worker", Worker, [{"rank": r} for r in range(2)], Pool(placement="PACK"))
    assert asyncio.run(group.call("add", 1, timeout_s=60)) == [1, 2]
    assert before - ray.available_resources().get("CPU", 0) == 2
    group.kill()
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == before


def test_a_group_that_does_not_fit_is_refused_with_what_is_free(cluster, monkeypatch):
    monkeypatch.setattr("posttrain.compute.pool.PLACE_S", 1.0)
    with pytest.raises(ComputeError, match=r"worker: no room for 2 actors of \{'CPU': 8\}; the cluster has . CPUs"):
        ActorGroup("worker", Worker, [{"rank": 0}, {"rank": 1}], Pool(cpus=8, placement="SPREAD"))


def test_threads_of_an_actor_soon_sleep_at_a_barrier_unless_a_person_says_otherwise(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert environment(Pool(threads=2))["GOMP_SPINCOUNT"] == SPINS
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert environment(Pool(threads=2))["GOMP_SPINCOUNT"] == "7"


def test_ranks_of_a_node_are_consecutive():
    assert by_node({0: "b", 1: "a", 2: "b", 3: "a", 4: "b"}) == [0, 2, 4, 1, 3]


def test_ray_listens_on_loopback_only(cluster):
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    sockets = [c for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN and c.pid in ours]
    assert sockets, "Ray is up and listens somewhere"
    assert {c.laddr.ip for c in sockets} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
