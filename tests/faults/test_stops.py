"""A run that is asked to stop, one of whose ranks hangs, or whose disk is full: what it says, and what is left."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from posttrain.workflow.stopping import EXIT_CODE
from runs import (
    ROOT,
    TWO_RANKS,
    Prepared,
    metrics,
    prepared,
    result_of,
    run_step,
    small_config,
    steps_again,
    steps_done,
)
from saves import files_of
from small_disk import small_disk

STEPS = 8
SAVED = {"warmup.num_steps": STEPS, "checkpoint.every_steps": 3}
CONFIG = small_config(**TWO_RANKS, **SAVED)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("inputs"), CONFIG)


def inputs_of(base: Prepared, folder: Path) -> dict[str, str]:
    return {"root": str(folder), "model_uri": base.model_uri, "tokens_uri": base.tokens_uri}


def train(base: Prepared, folder: Path, *, fault: str | None = None, config=CONFIG):
    return run_step("train", config, folder, fault=fault, **inputs_of(base, folder))


def outcome(folder: Path) -> dict[str, Any]:
    return {
        "metrics": metrics(folder / "metrics" / "warmup.jsonl"),
        "ledger": (folder / "ledger" / "warmup.jsonl").read_bytes(),
        "weights": (folder / "warmup_model" / "model.safetensors").read_bytes(),
        "state": files_of(folder / "checkpoints" / "warmup" / f"step_{STEPS:06d}"),
    }


def steps_saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints" / "warmup").glob("step_*"))


@pytest.fixture(scope="module")
def uninterrupted(base: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    result_of(train(base, folder))
    return outcome(folder)


@pytest.mark.fault("F3", outcome="RESUME")
def test_a_sigterm_saves_after_the_step_and_the_retry_goes_on_bitwise(
    base: Prepared, uninterrupted: dict[str, Any], tmp_path: Path, record_property
):
    stopped = train(base, tmp_path, fault="term:loop.before_train@5")
    assert stopped.returncode == EXIT_CODE, stopped.stderr[-2000:]
    assert "PreemptedError: stopped by SIGTERM after step 5, which is saved" in stopped.stderr
    assert steps_saved(tmp_path) == ["step_000003", "step_000005"]
    done = steps_done(tmp_path, "warmup")
    resumed = train(base, tmp_path)
    record_property("lost_steps", steps_again(done, resumed))
    assert f"continuing after step 5 of {STEPS}" in resumed.stdout
    result_of(resumed)
    assert outcome(tmp_path) == uninterrupted


RANKS, SAVES, LATER = (0, 1), (1, 2, 3), range(2, STEPS + 1)
PLACES = [
    *(f"loop.before_train@{step}" for step in LATER),
    *(f"policy.train_step.{rank}@{step}" for rank in RANKS for step in LATER),
    *(f"engine.before_update.{rank}@{step}" for rank in RANKS for step in LATER),
    *(f"checkpoint.after_snapshot.{rank}@{save}" for rank in RANKS for save in SAVES),
    *(f"checkpoint.after_tensors.{rank}@{save}" for rank in RANKS for save in SAVES),
    *(f"checkpoint.{phase}@{save}" for phase in ("before_manifest", "before_commit", "after_commit") for save in SAVES),
]
"""Where the driver or one rank may be killed."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", random.Random(20261128).sample(PLACES, 3))
@pytest.mark.fault("F1", outcome="RESUME")
def test_a_kill_at_a_random_place_resumes_bitwise(
    base: Prepared, uninterrupted: dict[str, Any], tmp_path: Path, fault: str, record_property
):
    assert train(base, tmp_path, fault=fault).returncode != 0
    done = steps_done(tmp_path, "warmup")
    resumed = train(base, tmp_path)
    result_of(resumed)
    record_property("lost_steps", steps_again(done, resumed))
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.slow
@pytest.mark.fault("F1", outcome="RESUME")
def test_two_kills_of_one_run_resume_bitwise(base: Prepared, uninterrupted: dict[str, Any], tmp_path: Path):
    assert train(base, tmp_path, fault="engine.before_update.1@5").returncode != 0
    second = train(base, tmp_path, fault="loop.before_train@5")
    assert second.returncode != 0 and f"continuing after step 3 of {STEPS}" in second.stdout
    last = train(base, tmp_path)
    assert f"continuing after step 6 of {STEPS}" in last.stdout
    result_of(last)
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.slow
@pytest.mark.fault("F19", outcome="RESUME")
def test_a_flipped_bit_in_a_shard_falls_back_and_trains_to_the_same_bytes(
    base: Prepared, uninterrupted: dict[str, Any], tmp_path: Path, record_property
):
    assert train(base, tmp_path, fault="loop.before_train@8").returncode != 0
    done = steps_done(tmp_path, "warmup")
    assert steps_saved(tmp_path) == ["step_000003", "step_000006"]
    shard = tmp_path / "checkpoints" / "warmup" / "step_000006" / "rank_00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    resumed = train(base, tmp_path)
    record_property("lost_steps", steps_again(done, resumed))
    assert "rank_00001.safetensors" in resumed.stdout and "differs from its hash" in resumed.stdout
    assert f"continuing after step 3 of {STEPS}" in resumed.stdout
    result_of(resumed)
    assert outcome(tmp_path) == uninterrupted
    assert list((tmp_path / "checkpoints" / "warmup").glob("step_000006.damaged-*")), "kept for whoever looks into it"


@pytest.mark.slow
@pytest.mark.fault("F15", outcome="REFUSE")
def test_a_second_run_of_the_same_root_is_refused_while_the_first_lives(base: Prepared, tmp_path: Path):
    running = started(base, tmp_path, "stop:policy.train_step.1@5")
    wait_for(running, tmp_path, f"warmup 4/{STEPS}")
    second = train(base, tmp_path)
    assert second.returncode == 1
    assert f"is being written by process {running.pid} on " in second.stderr
    running.kill()
    running.wait()
    result_of(train(base, tmp_path))


def started(base: Prepared, folder: Path, fault: str, config=CONFIG) -> subprocess.Popen:
    """A run in the background, as run_step() starts one; its output goes to folder/log."""
    inputs = {"config": config.model_dump(mode="json"), **inputs_of(base, folder)}
    (folder / "train.json").write_text(json.dumps(inputs))
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    with open(folder / "log", "w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "steps.train", str(folder / "train.json")],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "POSTTRAIN_FAULT": fault},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def wait_for(process: subprocess.Popen, folder: Path, text: str) -> None:
    ends = time.monotonic() + 200
    while text not in (folder / "log").read_text():
        assert process.poll() is None and time.monotonic() < ends, (folder / "log").read_text()[-3000:]
        time.sleep(0.1)  # polls the log of a process that has no other channel; no outcome depends on it


@pytest.mark.slow
@pytest.mark.fault("F4", outcome="STOP")
def test_a_second_sigterm_ends_at_once_and_the_checkpoint_is_whole(
    base: Prepared, uninterrupted: dict[str, Any], tmp_path: Path, record_property
):
    # Rank 1 stops in step 5 for ever, so the first signal's step cannot end.
    running = started(base, tmp_path, "stop:policy.train_step.1@5")
    wait_for(running, tmp_path, f"warmup 4/{STEPS}")
    running.send_signal(signal.SIGTERM)
    wait_for(running, tmp_path, "SIGTERM: saving after this step, then stopping; again ends at once")
    assert running.poll() is None
    start = time.monotonic()
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=10) == -signal.SIGTERM
    record_property("detected_s", time.monotonic() - start)
    done = steps_done(tmp_path, "warmup")
    resumed = train(base, tmp_path)
    record_property("lost_steps", steps_again(done, resumed))
    assert f"continuing after step 3 of {STEPS}" in resumed.stdout
    result_of(resumed)
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.fault("F5", outcome="STOP")
def test_a_stopped_rank_ends_the_run_at_the_deadline_with_its_host_and_all_stacks(
    base: Prepared, tmp_path: Path, record_property
):
    deadline_s = 20
    config = small_config(**TWO_RANKS, **SAVED, **{"rollout.timeout_s": deadline_s})
    running = started(base, tmp_path, "stop:policy.train_step.1@5", config)
    wait_for(running, tmp_path, f"warmup 4/{STEPS}")
    start = time.monotonic()
    assert running.wait(timeout=deadline_s + 30) not in (0, EXIT_CODE)
    record_property("detected_s", time.monotonic() - start)
    record_property("lost_steps", steps_done(tmp_path, "warmup") - int(steps_saved(tmp_path)[-1].removeprefix("step_")))
    log = (tmp_path / "log").read_text()
    assert re.search(rf"WorkerHungError: policy [01]: train_step\(\) did not finish within {deadline_s} s", log)
    assert re.search(r"policy 1 is process \d+ on \S+ and does not answer", log)
    assert "--- policy 0, process" in log and "all_reduce" in log, "the living rank's stacks"


@pytest.fixture
def disk_size(tmp_path: Path):
    """Puts the checkpoints on a tmpfs; sets its size."""
    with small_disk(tmp_path / "checkpoints") as size:
        yield size


@pytest.mark.slow
@pytest.mark.fault("F12", outcome="CONTINUE")
def test_a_full_disk_costs_saves_and_not_the_run_and_with_room_it_goes_on(
    base: Prepared, uninterrupted: dict[str, Any], tmp_path: Path, disk_size, record_property
):
    state_kib = sum(map(len, uninterrupted["state"].values())) // 1024
    disk_size(int(1.5 * state_kib))
    full = train(base, tmp_path)
    assert full.returncode == 1 and "StorageError" in full.stderr and "are needed and" in full.stderr
    assert "WARNING: a checkpoint failed" in full.stdout and f"warmup {STEPS}/{STEPS}" in full.stdout
    assert steps_saved(tmp_path) == ["step_000003"], "the good one stays"
    seen = metrics(tmp_path / "metrics" / "warmup.jsonl")
    assert [row.get("checkpoint/failures") for row in seen] == [None] * 6 + [1.0, 1.0]
    disk_size(10 * state_kib)
    done = steps_done(tmp_path, "warmup")
    resumed = train(base, tmp_path)
    record_property("lost_saves", seen[-1]["checkpoint/failures"])
    record_property("lost_steps", steps_again(done, resumed))
    assert f"continuing after step 3 of {STEPS}" in resumed.stdout
    result_of(resumed)
    assert outcome(tmp_path) == uninterrupted
