"""A wall clock that jumps changes nothing: deadlines are the monotonic clock's, and order is that of step numbers."""

import os
import re
import signal
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path

import pytest

from posttrain.compute.lease import Lease
from posttrain.errors import CheckpointError
from posttrain.workflow.clock import Clock, SaveClock
from saves import assert_is, checkpoints, save_alone

ROOT = Path(__file__).parents[3]
YEAR_S = 365 * 86_400.0
JUMPS = (0.0, YEAR_S, -YEAR_S, 5.0, -3600.0)

HOLD = """
import sys, time
from itertools import cycle
real, jumps = time.time, cycle([0.0, 3e7, -3e7, 5.0, -3600.0])
time.time = lambda: real() + next(jumps)
from posttrain.compute.lease import Lease
lease = Lease(sys.argv[1], renew_s=0.05, expire_s=60)
lease.acquire()
print("held", flush=True)
sys.stdin.read(1)
"""


@pytest.fixture
def jumping(monkeypatch):
    """time.time() is another year at every call."""
    real, jumps = time.time, cycle(JUMPS)
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))


@pytest.fixture
def holder(tmp_path: Path):
    """A process with such a clock that holds the lease."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


WALL_CLOCK = re.compile(r"\btime\.(time|time_ns|localtime|gmtime|ctime)\b|\.(now|utcnow|today)\(|from time import")
HARMLESS = {
    "lib/posttrain/workflow/trackers.py": 1,
    "lib/posttrain/data/chunk_cache.py": 2,
    "lib/posttrain/workflow/registry.py": 1,
}
"""MLflow wants a timestamp with every number, and nothing reads it back; a cache of bytes, proved when they are read,
marks which were used last, so a jump decides no more than what is fetched again; records of a registry tell people when
they were made, and are in the order of their numbers."""


def test_no_deadline_and_no_order_reads_the_wall_clock():
    found = {}
    for folder in ("lib", "steps", "flows"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if uses := WALL_CLOCK.findall(path.read_text()):
                found[str(path.relative_to(ROOT))] = len(uses)
    assert found == HARMLESS, "use time.monotonic(), or step numbers"


@pytest.mark.fault("F16", outcome="CONTINUE")
def test_a_living_writer_whose_clock_jumps_keeps_its_lease(tmp_path: Path, holder, jumping):
    with pytest.raises(CheckpointError, match=f"is being written by process {holder.pid} on "):
        Lease(str(tmp_path), renew_s=0.05, expire_s=20.0).acquire()


@pytest.mark.fault("F16", outcome="CONTINUE")
def test_a_silent_writer_is_overtaken_after_the_real_time_and_not_before(tmp_path: Path, holder, jumping):
    os.kill(holder.pid, signal.SIGSTOP)
    start = time.monotonic()
    mine = Lease(str(tmp_path), renew_s=0.05, expire_s=0.5)
    mine.acquire()
    assert 0.5 <= time.monotonic() - start < 20 and mine.token == 2
    mine.release()


@pytest.mark.fault("F16", outcome="CONTINUE")
def test_the_newest_checkpoint_is_that_of_the_highest_step_whatever_the_files_say(tmp_path: Path, jumping):
    save_alone(str(tmp_path / "c"), 1, 2)
    for path in (tmp_path / "c").rglob("*"):
        age = YEAR_S if "step_000001" in str(path) else -YEAR_S
        os.utime(path, (time.time() + age,) * 2)
    assert_is(checkpoints(tmp_path / "c").latest(), 2)
    save_alone(str(tmp_path / "c"), 3)
    assert [path.name for path in sorted((tmp_path / "c").glob("step_*"))] == ["step_000002", "step_000003"]


@pytest.mark.fault("F16", outcome="CONTINUE")
def test_saves_are_due_by_steps_and_real_seconds(jumping):
    clock = SaveClock(num_steps=10, every_steps=3, every_seconds=3600.0)
    assert [done for done in range(1, 11) if clock.due(done)] == [3, 6, 9, 10]
    watch = Clock()
    with watch.phase("train"):
        pass
    assert 0 <= watch.metrics({})["time/step_s"] < 60
