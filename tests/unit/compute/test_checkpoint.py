"""A checkpoint is committed whole, proved when read, and never lost to a crash, a flipped bit or another run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from posttrain import storage
from posttrain.compute.committed import open_checkpoint, read_state
from posttrain.compute.shard_file import read_parts
from posttrain.errors import CheckpointError, DamagedError
from saves import IDENTITY, assert_is, blank, checkpoints, reports_of, save, save_alone, tensors

TESTS = Path(__file__).parents[2]
SHARD = "rank_00000.safetensors"


def flip(uri, name=SHARD, at=-1):
    """Change one bit of a file of a committed checkpoint."""
    where = file_of(uri, name)
    data = bytearray(storage.read_bytes(where))
    data[at] ^= 1
    storage.write_bytes(where, bytes(data))


def file_of(uri, name):
    if name == "manifest.json":
        return storage.join(uri, name)
    return storage.join(open_checkpoint(uri).folder, name)


def test_nothing_is_found_before_the_first_save(root_uri):
    assert checkpoints(root_uri).latest() is None


def test_the_latest_checkpoint_comes_back_exactly(root_uri):
    save_alone(root_uri, 1, 2)
    assert_is(checkpoints(root_uri).latest(), 2)
    assert read_state(storage.join(root_uri, "step_000001"))["step"] == 1


def test_the_ranks_share_the_work_and_nothing_is_written_twice(root_uri):
    with checkpoints(root_uri).writing() as saved:
        save(saved, 1, ranks=3)
    found = checkpoints(root_uri).latest()
    assert_is(found, 1)
    assert len(found.index.files) == 3
    assert {part.file for entry in found.index.tensors.values() for part in entry.parts} == set(found.index.files)


def test_other_tools_open_a_shard(tmp_path):
    save_alone(str(tmp_path), 1)
    held = load_file(tmp_path / "step_000001" / SHARD)
    assert held.keys() == tensors(1).keys()
    assert all(torch.equal(held[name], expected) for name, expected in tensors(1).items())


def test_a_tensor_of_many_pieces_and_one_that_is_not_contiguous(root_uri, monkeypatch):
    monkeypatch.setattr("posttrain.compute.shard_file.PIECE_BYTES", 64)
    monkeypatch.setattr("posttrain.compute.sinks.PART_BYTES", 5 * 1024 * 1024)
    held = {"large": torch.randn(700_001, 3), "turned": torch.arange(60.0).reshape(20, 3).T.requires_grad_()}
    monkeypatch.setattr("posttrain.compute.shard_file.PIECE_BYTES", 100_000)
    with checkpoints(root_uri).writing() as saved:
        attempt = saved.begin(1, 1)
        shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
        saved.commit(attempt, shapes=shapes, reports=reports_of(held, attempt.folder), state={})
    found = checkpoints(root_uri).latest()
    read = {name: torch.zeros(shape) for name, shape in shapes.items()}
    read_parts(found.folder, found.index.stored(), read)
    assert all(torch.equal(read[name], held[name].detach()) for name in held)
    assert len(found.index.tensors["large"].parts[0].sha256) == 85


def test_steps_are_ordered_as_numbers_not_as_names(root_uri):
    save_alone(root_uri, 999_999, 1_000_000)
    assert_is(checkpoints(root_uri).latest(), 1_000_000)


def test_a_committed_step_is_never_overwritten(root_uri):
    with checkpoints(root_uri).writing() as saved:
        save(saved, 1)
        attempt = saved.begin(1, 1)
        reports = reports_of(tensors(5), attempt.folder)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors(5).items()}
        with pytest.raises(CheckpointError, match=r"overwritten|another writer"):
            saved.commit(attempt, shapes=shapes, reports=reports, state={})
    assert_is(checkpoints(root_uri).latest(), 1)


def test_only_the_newest_are_kept(root_uri):
    save_alone(root_uri, 1, 2, 3, 4)
    assert storage.list_folders(root_uri) == ["step_000003", "step_000004"]


@pytest.mark.parametrize("name", ["index.json", "state.json", "manifest.json"])
@pytest.mark.fault("F19", outcome="RESUME")
def test_a_damaged_newest_is_named_set_aside_and_the_one_before_is_used(root_uri, name, capsys):
    save_alone(root_uri, 1, 2)
    newest = storage.join(root_uri, "step_000002")
    where = file_of(newest, name)
    flip(newest, name, at=20)
    assert_is(checkpoints(root_uri).latest(), 1)
    assert where in capsys.readouterr().out
    assert not storage.exists(storage.join(newest, "manifest.json"))


@pytest.mark.parametrize("damage", ["truncated", "missing", "empty"])
@pytest.mark.fault("F19", outcome="RESUME")
def test_a_shard_that_is_not_there_in_full_is_found_without_reading_it(root_uri, damage, capsys):
    save_alone(root_uri, 1, 2)
    where = file_of(storage.join(root_uri, "step_000002"), SHARD)
    if damage == "missing":
        storage.remove_file(where)
    else:
        storage.write_bytes(where, b"" if damage == "empty" else storage.read_bytes(where)[:-1])
    assert_is(checkpoints(root_uri).latest(), 1)
    assert where in capsys.readouterr().out


@pytest.mark.parametrize("at", [-1, -9, -21])
@pytest.mark.fault("F19", outcome="RESUME")
def test_a_flipped_bit_of_any_tensor_is_named_when_it_is_read(root_uri, at):
    save_alone(root_uri, 1)
    flip(storage.join(root_uri, "step_000001"), at=at)
    found = checkpoints(root_uri).latest()
    with pytest.raises(DamagedError, match=rf"{SHARD}: (model|optimizer)\.weight\S* differs from its hash"):
        read_parts(found.folder, found.index.stored(), blank())


def test_a_step_that_was_damaged_is_written_again(root_uri):
    save_alone(root_uri, 1, 2)
    for _ in range(2):
        flip(storage.join(root_uri, "step_000002"), "state.json")
        assert_is(checkpoints(root_uri).latest(), 1)
        save_alone(root_uri, 2)
        assert_is(checkpoints(root_uri).latest(), 2)


def test_all_damaged_is_a_start_from_the_beginning(root_uri):
    save_alone(root_uri, 1)
    flip(storage.join(root_uri, "step_000001"), "index.json")
    assert checkpoints(root_uri).latest() is None


def test_what_was_never_committed_is_not_found_and_is_removed_by_the_next_writer(root_uri):
    save_alone(root_uri, 1)
    left = "step_000003.tmp-abc" if not storage.is_s3(root_uri) else "step_000003"
    storage.write_bytes(storage.join(root_uri, left, "x", SHARD), b"half")
    assert_is(checkpoints(root_uri).latest(), 1)
    with checkpoints(root_uri).writing():
        assert storage.list_folders(root_uri) == ["step_000001"]


def test_the_next_writer_keeps_what_was_set_aside(root_uri):
    save_alone(root_uri, 1, 2)
    flip(storage.join(root_uri, "step_000002"), "index.json")
    checkpoints(root_uri).latest()
    before = storage.list_folders(root_uri)
    with checkpoints(root_uri).writing():
        assert storage.list_folders(root_uri) == before and len(before) == 2


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keep=st.integers(1, 3),
    events=st.lists(st.sampled_from(["save", "damage", "crash", "restart"]), min_size=1, max_size=12),
)
@pytest.mark.fault("F24", outcome="RESUME")
def test_as_long_as_one_save_is_sound_there_is_one_to_resume_from(tmp_path_factory, keep, events):
    root = str(tmp_path_factory.mktemp("root"))
    step, sound = 0, set()
    for event in events:
        if event == "save":
            step += 1
            save_alone(root, step, keep=keep)
            sound.add(step)
            kept = {int(name[5:]) for name in storage.list_folders(root) if "." not in name}
            assert step in kept and len(kept) <= keep
            sound &= kept
        elif event == "damage" and step in sound:
            flip(storage.join(root, f"step_{step:06d}"), "state.json")
            sound.discard(step)
        elif event == "crash":
            storage.write_bytes(storage.join(root, f"step_{step + 1:06d}.tmp-1-a", SHARD), b"half")
        found = checkpoints(root, keep=keep).latest()
        if sound:
            assert_is(found, max(sound))
        else:
            assert found is None
        step = max(sound, default=0)


@pytest.mark.parametrize(
    ("identity", "difference"),
    [
        ({"config.lr": 0.2, "tokenizer": "t0"}, "config.lr 0.1 -> 0.2;"),
        ({"config.lr": 0.1}, "tokenizer t0 -> None;"),
        ({**IDENTITY, "data": "d0"}, "data None -> d0;"),
        ({"config.lr": 0.2, "tokenizer": "t1"}, "config.lr 0.1 -> 0.2, tokenizer t0 -> t1;"),
        ({**IDENTITY, **{f"n{i}": i for i in range(12)}}, "and 2 more;"),
    ],
)
@pytest.mark.fault("F21", outcome="REFUSE")
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(root_uri, identity, difference):
    save_alone(root_uri, 1)
    with pytest.raises(CheckpointError) as error:
        checkpoints(root_uri, identity=identity).latest()
    assert difference in str(error.value)
    assert_is(checkpoints(root_uri).latest(), 1)


@pytest.mark.fault("F21", outcome="REFUSE")
def test_another_architecture_is_refused_with_names_shapes_and_dtypes(tmp_path):
    save_alone(str(tmp_path), 1)
    index = checkpoints(tmp_path).latest().index
    other = blank() | {"model.weight": torch.zeros(4, 3), "model.bias": torch.zeros(1)}
    other["optimizer.weight.exp_avg"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as error:
        index.check_same(other, where="here")
    for text in (
        "3 differences",
        "model.bias is missing",
        "model.weight F32 [4, 2] -> F32 [4, 3]",
        "BF16 [3] -> F32 [3]",
    ):
        assert text in str(error.value)


@pytest.mark.fault("F22", outcome="REFUSE")
def test_missing_optimizer_state_is_refused_by_name(tmp_path):
    with checkpoints(tmp_path).writing() as saved:
        held = {"model.weight": tensors(1)["model.weight"]}
        attempt = saved.begin(1, 1)
        saved.commit(attempt, shapes={"model.weight": (4, 2)}, reports=reports_of(held, attempt.folder), state={})
    with pytest.raises(CheckpointError, match=r"no optimizer state of 2 tensors: optimizer\.weight\.exp_avg, "):
        checkpoints(tmp_path).latest().index.check_same(blank(), where="here")


@pytest.mark.fault("F23", outcome="REFUSE")
def test_a_newer_format_is_refused_and_not_taken_for_damage(tmp_path, monkeypatch):
    monkeypatch.setattr("posttrain.compute.checkpoint.FORMAT", 2)
    with pytest.raises(CheckpointError, match="format 2, and this version of posttrain reads 1"):
        save_alone(str(tmp_path), 1)
        checkpoints(tmp_path).latest()


GOLDEN = TESTS / "golden" / "checkpoint_format_1"


@pytest.mark.fault("F23", outcome="RESUME")
def test_the_checkpoint_that_format_1_was_defined_by_loads_for_ever():
    assert_is(checkpoints(GOLDEN).latest(), 7)
    assert open_checkpoint(str(GOLDEN / "step_000007")).manifest["made_from"] == {"model_uri": "/m", "backend": "b"}


PHASES = {
    "checkpoint.after_snapshot@2": 1,
    "checkpoint.mid_shard@5": 1,
    "checkpoint.after_tensors@2": 1,
    "checkpoint.before_manifest@2": 1,
    "checkpoint.before_commit@2": 1,
    "checkpoint.after_commit@2": 2,
    "checkpoint.before_prune@1": 3,
    "checkpoint.mid_prune@1": 3,
}
"""A place of the second save, or of the third where it prunes, and the step that is then the newest."""

KILLED = """
import os, sys
from saves import save_alone
for fault in sys.argv[2:]:
    if (child := os.fork()) == 0:
        os.environ["POSTTRAIN_FAULT"] = fault
        save_alone(f"{sys.argv[1]}/{fault}", 1, 2, 3)
        os._exit(0)
    print(fault, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def run_until_killed(root, faults):
    """Save steps 1 to 3, two kept, once for each fault, in processes that SIGKILL ends there; forked, as importing
    torch takes seconds."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", KILLED, root, *faults]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{fault} {-signal.SIGKILL}" for fault in faults], done.stderr


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    run_until_killed(str(root), PHASES)
    return root


@pytest.mark.parametrize(("fault", "step"), PHASES.items())
@pytest.mark.fault("F2", outcome="RESUME")
def test_kill_minus_nine_in_any_phase_leaves_a_whole_checkpoint(killed, fault, step):
    uri = str(killed / fault)
    assert_is(checkpoints(uri).latest(), step)
    save_alone(uri, 4, 5)  # at once: a dead process of this machine holds nobody up
    assert_is(checkpoints(uri).latest(), 5)
    assert storage.list_folders(uri) == ["step_000004", "step_000005"], "what was left half done is gone"


@pytest.mark.fault("F2", outcome="RESUME")
def test_kill_minus_nine_leaves_a_whole_checkpoint_on_s3(s3_bucket):
    phases = {"checkpoint.before_commit@2": 1, "checkpoint.after_commit@2": 2}
    run_until_killed(f"{s3_bucket}/c", phases)
    for fault, step in phases.items():
        uri = f"{s3_bucket}/c/{fault}"
        assert_is(checkpoints(uri).latest(), step)
        save_alone(uri, 4, 5)
        assert storage.list_folders(uri) == ["step_000004", "step_000005"]
