"""The ledger's file, on disk and on S3: its lines survive a kill as far as a checkpoint needs them, and not further."""

import os
import signal
import subprocess
import sys
from contextlib import closing

import pytest

from posttrain import storage
from posttrain.errors import CheckpointError, StorageError
from posttrain.workflow.ledger_file import LedgerFile, read_ledger
from small_disk import small_disk


def row(step):
    return {"step": step, "digest": f"{step:064x}", "draws": [[4 * step, 4 * step + 3]], "dropped": {}}


@pytest.fixture
def uri(root_uri):
    return f"{root_uri}/ledger/warmup.jsonl"


def written(uri, steps):
    file = LedgerFile(uri)
    file.restore(0)
    for step in range(steps):
        file.append(row(step))
    file.flush()
    return file


def test_what_is_written_is_read_again(uri):
    written(uri, 5)
    assert read_ledger(uri) == [row(step) for step in range(5)]


def test_a_resume_keeps_what_the_checkpoint_holds_and_repeats_the_rest(uri):
    written(uri, 5)
    again = LedgerFile(uri)
    again.restore(3)
    again.append(row(3) | {"digest": "f" * 64})
    again.flush()
    assert [each["digest"] for each in read_ledger(uri)] == [row(step)["digest"] for step in range(3)] + ["f" * 64]


def test_a_fresh_start_forgets_an_attempt_that_no_checkpoint_holds(uri):
    written(uri, 2)
    written(uri, 1)
    assert read_ledger(uri) == [row(0)]


def test_a_torn_line_beyond_the_checkpoint_is_forgotten(uri):
    written(uri, 4)
    storage.write_bytes(uri, storage.read_bytes(uri)[:-20])
    assert read_ledger(uri) == [row(step) for step in range(3)]
    again = LedgerFile(uri)
    again.restore(3)
    again.append(row(3))
    again.flush()
    assert read_ledger(uri) == [row(step) for step in range(4)]


def test_a_torn_line_that_the_checkpoint_holds_is_named(uri):
    written(uri, 4)
    storage.write_bytes(uri, storage.read_bytes(uri)[:-20])
    with pytest.raises(CheckpointError, match=r"warmup\.jsonl ends before the line of step 3, .* holds 4 steps"):
        LedgerFile(uri).restore(4)


def test_a_lost_file_is_named(uri):
    with pytest.raises(CheckpointError, match=r"warmup\.jsonl ends before the line of step 0"):
        LedgerFile(uri).restore(1)
    with pytest.raises(CheckpointError, match=r"warmup\.jsonl does not exist"):
        read_ledger(uri)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda lines: [lines[0], b"\0" * 30, *lines[2:]], "line 2, of step 1, is damaged"),
        (lambda lines: [lines[0], b"\xff\r{}", *lines[2:]], "line 2, of step 1, is damaged"),
        (lambda lines: [lines[0], b'{"step":1}', *lines[2:]], "line 2, of step 1, is damaged"),
        (lambda lines: [lines[0], *lines[2:]], "line 2 is of step 2 where step 1 belongs"),
        (lambda lines: [lines[0], lines[0], *lines[2:]], "line 2 is of step 0 where step 1 belongs"),
    ],
)
def test_a_damaged_line_is_named(uri, damage, said):
    written(uri, 4)
    lines = storage.read_bytes(uri).splitlines()
    storage.write_bytes(uri, b"".join(line + b"\n" for line in damage(lines)))
    with pytest.raises(CheckpointError, match=said):
        LedgerFile(uri).restore(3)
    with pytest.raises(CheckpointError, match=said):
        read_ledger(uri)
    LedgerFile(uri).restore(1)  # what lies beyond a checkpoint may be anything


def test_steps_that_are_skipped_or_repeated_are_a_mistake_of_ours(uri):
    file = written(uri, 2)
    for wrong in (row(1), row(3), {"step": 2}):
        with pytest.raises(AssertionError, match="step 2 is next"):
            file.append(wrong)


def test_a_failing_run_keeps_its_last_lines(uri):
    with pytest.raises(ZeroDivisionError), closing(LedgerFile(uri)) as file:
        file.restore(0)
        file.append(row(0))
        raise ZeroDivisionError
    assert read_ledger(uri) == [row(0)]


def test_a_run_that_fails_before_its_first_step_leaves_the_file_as_it_is(uri):
    with pytest.raises(ZeroDivisionError), closing(LedgerFile(uri)):
        raise ZeroDivisionError
    written(uri, 2)
    LedgerFile(uri).close()
    assert read_ledger(uri) == [row(0), row(1)]


def test_on_s3_the_object_is_written_when_a_checkpoint_needs_it_and_not_every_step(s3_bucket):
    uri = f"{s3_bucket}/ledger/warmup.jsonl"
    file = written(uri, 2)
    file.append(row(2))
    assert read_ledger(uri) == [row(0), row(1)]
    file.flush()
    assert read_ledger(uri) == [row(0), row(1), row(2)]


def test_a_killed_process_leaves_its_lines_on_disk(tmp_path):
    uri = str(tmp_path / "ledger" / "warmup.jsonl")
    code = (
        "import os, signal; from posttrain.workflow.ledger_file import LedgerFile\n"
        f"file = LedgerFile({uri!r}); file.restore(0)\n"
        "for step in range(3): file.append({'step': step, 'digest': '', 'draws': [], 'dropped': {}})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert [each["step"] for each in read_ledger(uri)] == [0, 1, 2]


@pytest.mark.fault("F12", outcome="STOP")
def test_a_disk_too_full_for_a_line_stops_the_run_and_the_resume_forgets_the_torn_one(tmp_path):
    with small_disk(tmp_path / "ledger") as size:
        uri = str(tmp_path / "ledger" / "warmup.jsonl")
        file = written(uri, 3)
        (tmp_path / "ledger" / "filler").write_bytes(b"x" * 60 * 1024)
        with pytest.raises(StorageError, match=r"warmup\.jsonl: No space left on device; .*it goes on from its last"):
            for step in range(3, 1000):
                file.append(row(step))
        size(1024)
        again = LedgerFile(uri)
        again.restore(3)
        again.append(row(3))
        assert read_ledger(uri) == [row(step) for step in range(4)]
