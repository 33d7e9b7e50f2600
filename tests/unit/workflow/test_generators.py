"""Many askers, few calls: who shares a call, who pays for a failure, and what becomes of a generator that dies."""

import asyncio
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

import generator_actors
from posttrain.compute.cluster import Gang, ray_cluster
from posttrain.compute.generator import Request
from posttrain.compute.pool import Pool
from posttrain.compute.workers import ActorGroup
from posttrain.errors import ComputeError, GenerationError, WorkerDiedError, WorkerHungError
from posttrain.workflow.generators import Generators

PATIENT_S = 300
"""A deadline of what is not tested."""


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with ray_cluster(Gang(), num_cpus=4, num_gpus=0):
        yield


def requests(*seeds: int) -> list[Request]:
    return [Request(token_ids=(3, 4, 5), seed=seed, temperature=1.0, max_new_tokens=4) for seed in seeds]


def calls(folder: Path) -> list[tuple[int, list[int]]]:
    """What the generators were asked: version, seeds."""
    lines = [list(map(int, line.split())) for line in (folder / "calls").read_text().splitlines()]
    return [(version, seeds) for version, *seeds in lines]


def asked_again(folder: Path) -> int:
    """Requests that were sampled more than once."""
    seeds = [seed for _, asked in calls(folder) for seed in asked]
    return len(seeds) - len(set(seeds))


def gone(pid: int) -> bool:
    """Whether a process has ended, or does within a moment of its kill."""
    try:
        psutil.Process(pid).wait(10)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def use(
    name: str, folder: Path, work, *, count: int = 1, concurrency: int = 1, timeout_s: float = 60, failures: int = 1
):
    """Run work(generators), whose weights are of version 5 and can be sent again."""

    async def run():
        group = ActorGroup(
            "generator",
            getattr(generator_actors, name),
            [{"folder": str(folder)}] * count,
            Pool(cpus=0, concurrency=concurrency),
        )
        generators = Generators(group, timeout_s=PATIENT_S, max_failures=failures)

        async def send() -> None:
            generators.timeout_s = PATIENT_S  # the start of an actor takes as long as it takes
            await generators.sync(5, lambda rank: {}, dead_only=True)

        generators.send_weights = send
        await generators.sync(5, lambda rank: {})  # which waits for the actors to come up, however busy the machine is
        generators.timeout_s = timeout_s
        try:
            return await work(generators)
        finally:
            await generators.close()
            group.kill()

    return asyncio.run(run())


def test_who_asks_at_the_same_time_shares_a_call_and_gets_its_own_answer(tmp_path: Path):
    async def ask(generators):
        return await asyncio.gather(*(generators.generate(requests(n, n + 1)) for n in (10, 20, 30)))

    together = use("NotingGenerator", tmp_path, ask)
    assert calls(tmp_path) == [(5, [10, 11, 20, 21, 30, 31])]
    alone = generator_actors.StubGenerator(model_uri="", stop_ids=(2,), pad_id=0)
    alone.version = 5
    assert together == [alone.generate(requests(n, n + 1)) for n in (10, 20, 30)]


@pytest.mark.slow
def test_two_generators_share_what_waits(tmp_path: Path):
    async def ask(generators):
        await asyncio.gather(*(generators.generate(requests(n)) for n in range(5)))

    use("NotingGenerator", tmp_path, ask, count=2)
    assert sorted(seeds for _, seeds in calls(tmp_path)) == [[0, 1, 2], [3, 4]]


def test_a_generator_of_many_streams_works_on_several_calls_at_once(tmp_path: Path):
    async def ask(generators):
        await asyncio.gather(*(generators.generate(requests(n)) for n in range(4)))

    use("TwoAtOnce", tmp_path, ask, concurrency=3)
    assert sorted(seeds for _, seeds in calls(tmp_path)) == [[0], [1], [2], [3]]


def test_weights_come_between_the_calls_of_an_engine_that_takes_one_at_a_time(tmp_path: Path):
    async def ask(generators):
        first = asyncio.create_task(generators.generate(requests(1)))
        await asyncio.sleep(0)  # lets it leave
        await asyncio.sleep(0)
        second = asyncio.create_task(generators.generate(requests(2)))
        await generators.sync(6, lambda rank: {})
        await asyncio.gather(first, second)

    use("OneAtATime", tmp_path, ask)
    assert calls(tmp_path) == [(5, [1]), (6, [2])]


@pytest.mark.fault("F6", outcome="CONTINUE")
def test_a_generator_that_dies_is_replaced_and_its_requests_are_asked_again_once(
    tmp_path: Path, capsys, record_property
):
    async def ask(generators):
        start = time.monotonic()
        answers = await asyncio.gather(*(generators.generate(requests(n)) for n in range(3)))
        record_property("detected_s", time.monotonic() - start)
        return [answer[0].versions[0] for answer in answers], generators.deaths

    assert use("DiesOnce", tmp_path, ask) == ([5, 5, 5], 1)
    assert calls(tmp_path) == [(5, [0, 1, 2]), (5, [0, 1, 2])]
    record_property("lost_requests", asked_again(tmp_path))
    assert "generator 0 died and is replaced" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.fault("F6", outcome="CONTINUE")
def test_a_generator_that_died_idle_is_replaced_by_the_next_sync(tmp_path: Path):
    async def ask(generators):
        with pytest.raises(ComputeError):
            await generators.group.call_one(0, "generate", requests(1), timeout_s=60)
        await generators.sync(6, lambda rank: {})
        return (await generators.generate(requests(2)))[0].versions[0]

    assert use("DiesOnce", tmp_path, ask) == 6


@pytest.mark.slow
@pytest.mark.fault("F6", outcome="STOP")
def test_more_deaths_than_may_be_stop_the_run(tmp_path: Path, noticed):
    message = r"(?s)generator 0 died during generate\(\).*2 generators died or hung, rollout.max_failures is 1"

    async def ask(generators):
        with noticed():
            await generators.generate(requests(1))

    with pytest.raises(WorkerDiedError, match=message):
        use("DiesWhenAsked", tmp_path, ask)


@pytest.mark.fault("F7", outcome="CONTINUE")
def test_a_generator_that_hangs_is_killed_and_replaced_and_its_requests_are_asked_again_once(
    tmp_path: Path, capsys, record_property
):
    async def ask(generators):
        pid, start = await generators.group.call_one(0, "pid", timeout_s=60), time.monotonic()
        answers = await asyncio.gather(*(generators.generate(requests(n)) for n in range(3)))
        record_property("detected_s", time.monotonic() - start)
        assert gone(pid)
        return [answer[0].versions[0] for answer in answers], generators.deaths

    assert use("HangsOnce", tmp_path, ask, timeout_s=4) == ([5, 5, 5], 1)
    assert calls(tmp_path) == [(5, [0, 1, 2]), (5, [0, 1, 2])]
    record_property("lost_requests", asked_again(tmp_path))
    said = "generator 0 hung, is killed and is replaced: generator 0: generate() did not finish within 4 s"
    assert said in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.fault("F7", outcome="CONTINUE")
def test_a_generator_that_stopped_idle_is_replaced_by_the_next_sync(tmp_path: Path):
    async def ask(generators):
        pid = await generators.group.call_one(0, "pid", timeout_s=60)
        os.kill(pid, signal.SIGSTOP)
        deadlines = iter([4, PATIENT_S])  # that of the stopped one, and that in which another starts

        def weights(rank: int) -> dict:
            generators.timeout_s = next(deadlines)
            return {}

        await generators.sync(6, weights)
        assert gone(pid)
        return (await generators.generate(requests(2)))[0].versions[0]

    assert use("NotingGenerator", tmp_path, ask) == 6


@pytest.mark.slow
@pytest.mark.fault("F7", outcome="STOP")
def test_a_sync_whose_weights_do_not_come_is_not_blamed_on_the_generator(tmp_path: Path, noticed):
    async def ask(generators):
        never = generators.group.start(1, "generate", requests(1))
        with noticed():
            await generators.sync(6, lambda rank: never if rank == 0 else {})

    with pytest.raises(WorkerHungError, match="waited for weights that did not come: the policy hangs"):
        use("Hangs", tmp_path, ask, count=2, concurrency=2, timeout_s=4)


@pytest.mark.slow
@pytest.mark.fault("F7", outcome="STOP")
def test_a_generator_that_hangs_for_good_stops_the_run_past_the_budget(tmp_path: Path, noticed):
    message = r"(?s)generator 0: generate\(\) did not finish.*2 generators died or hung, rollout.max_failures is 1"

    async def ask(generators):
        send = generators.send_weights

        async def and_be_short() -> None:
            await send()
            generators.timeout_s = 4

        generators.send_weights = and_be_short
        with noticed():
            await generators.generate(requests(1))

    with pytest.raises(WorkerHungError, match=message):
        use("Hangs", tmp_path, ask, timeout_s=4)


def test_only_who_asked_for_it_pays_for_a_request_that_fails(tmp_path: Path):
    async def ask(generators):
        work = (generators.generate(requests(n)) for n in (6, 7, 8))
        return await asyncio.gather(*work, return_exceptions=True)

    six, seven, eight = use("RefusesSeed7", tmp_path, ask)
    assert isinstance(seven, GenerationError) and "ValueError: no such token" in str(seven)
    assert len(six) == len(eight) == 1
    assert [seeds for _, seeds in calls(tmp_path)] == [[6, 7, 8], [6], [7], [8]]


def test_an_answer_of_the_wrong_length_is_named(tmp_path: Path):
    with pytest.raises(GenerationError, match="generator 0 answered 1 of 2 requests"):
        use("ForgetsOne", tmp_path, lambda generators: generators.generate(requests(1, 2)))
