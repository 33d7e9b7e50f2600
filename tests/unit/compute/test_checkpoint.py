"""A checkpoint is committed whole, verified when read, and never lost to a crash, a flipped bit or another run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posttrain import storage
from posttrain.compute.checkpoint import Checkpoints
from posttrain.errors import CheckpointError

IDENTITY = {"config": "c0", "tokenizer": "t0"}


def checkpoints(uri, *, identity=IDENTITY, keep=2):
    return Checkpoints(uri, identity=identity, keep=keep)


def tensors(step):
    return {"weight": torch.full((4, 2), float(step)), "exp_avg": torch.arange(3).to(torch.bfloat16) + step}


def save(saved, *steps):
    for step in steps:
        saved.save(step, tensors(step), {"step": step, "metrics": [{"loss": 0.1 + step}]})


def assert_is(found, step):
    assert (found.step, found.state) == (step, {"step": step, "metrics": [{"loss": 0.1 + step}]})
    assert found.tensors().keys() == tensors(step).keys()
    for name, expected in tensors(step).items():
        assert found.tensors()[name].dtype == expected.dtype
        assert torch.equal(found.tensors()[name], expected)


def flip(uri, name="tensors.safetensors"):
    """Change the last bit of a file."""
    data = storage.read_bytes(storage.join(uri, name))
    storage.write_bytes(storage.join(uri, name), data[:-1] + bytes([data[-1] ^ 1]))


def test_nothing_is_found_before_the_first_save(root_uri):
    assert checkpoints(root_uri).latest() is None


def test_the_latest_checkpoint_comes_back_exactly(root_uri):
    saved = checkpoints(root_uri)
    save(saved, 1, 2)
    assert_is(saved.latest(), 2)


def test_steps_are_ordered_as_numbers_not_as_names(root_uri):
    saved = checkpoints(root_uri)
    save(saved, 999_999, 1_000_000)
    assert_is(saved.latest(), 1_000_000)


def test_a_tensor_that_is_not_contiguous_comes_back_as_it_was(tmp_path):
    saved, value = checkpoints(str(tmp_path)), torch.arange(6.0).reshape(2, 3).T.requires_grad_()
    saved.save(1, {"weight": value}, {})
    assert torch.equal(saved.latest().tensors()["weight"], value)


def test_a_committed_step_is_left_as_it_is(root_uri):
    saved = checkpoints(root_uri)
    save(saved, 1)
    saved.save(1, tensors(5), {"other": True})
    assert_is(saved.latest(), 1)


def test_only_the_newest_are_kept(root_uri):
    saved = checkpoints(root_uri, keep=2)
    save(saved, 1, 2, 3, 4)
    assert storage.list_folders(root_uri) == ["step_000003", "step_000004"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_is_named_set_aside_and_the_one_before_is_used(root_uri, name, capsys):
    saved = checkpoints(root_uri)
    save(saved, 1, 2)
    newest = storage.join(root_uri, "step_000002")
    flip(newest, name)
    assert_is(saved.latest(), 1)
    assert f"{newest}/{name}" in capsys.readouterr().out
    assert not storage.exists(storage.join(newest, "manifest.json"))


def test_a_step_that_was_damaged_is_written_again(root_uri):
    saved = checkpoints(root_uri)
    save(saved, 1, 2)
    for _ in range(2):
        flip(storage.join(root_uri, "step_000002"))
        assert_is(saved.latest(), 1)
        save(saved, 2)
        assert_is(saved.latest(), 2)


def test_all_damaged_is_a_start_from_the_beginning(root_uri):
    saved = checkpoints(root_uri)
    save(saved, 1)
    flip(storage.join(root_uri, "step_000001"))
    assert saved.latest() is None


def test_what_was_never_committed_is_not_found(root_uri):
    saved = checkpoints(root_uri)
    save(saved, 1)
    storage.write_bytes(storage.join(root_uri, "step_000002", "tensors.safetensors"), b"half")
    storage.write_bytes(storage.join(root_uri, "step_000003.tmp-abc", "manifest.json"), b"{}")
    assert_is(saved.latest(), 1)


def test_what_was_never_committed_does_not_push_out_a_good_checkpoint(root_uri):
    saved = checkpoints(root_uri, keep=1)
    save(saved, 3)
    storage.write_bytes(storage.join(root_uri, "step_000005", "tensors.safetensors"), b"half")
    save(saved, 4)
    assert_is(saved.latest(), 4)


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(root_uri):
    saved = checkpoints(root_uri, keep=2)
    save(saved, 3, 5)
    flip(storage.join(root_uri, "step_000005"))
    assert_is(saved.latest(), 3)
    saved = checkpoints(root_uri, keep=1)
    save(saved, 4)
    assert_is(saved.latest(), 4)


@pytest.mark.parametrize(
    ("identity", "difference"),
    [
        ({"config": "c1", "tokenizer": "t0"}, "config c0 -> c1;"),
        ({"config": "c0"}, "tokenizer t0 -> None;"),
        ({**IDENTITY, "data": "d0"}, "data None -> d0;"),
        ({"config": "c1", "tokenizer": "t1"}, "config c0 -> c1, tokenizer t0 -> t1;"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(root_uri, identity, difference):
    save(checkpoints(root_uri), 1)
    with pytest.raises(CheckpointError) as error:
        checkpoints(root_uri, identity=identity).latest()
    assert difference in str(error.value)
    assert_is(checkpoints(root_uri).latest(), 1)


def run_until_killed(uri, fault):
    """Save steps 1 and 2 in a process of its own that SIGKILL ends at `fault` of step 2."""
    here = Path(__file__)
    program = f"import sys; from {here.stem} import checkpoints, save; save(checkpoints(sys.argv[1]), 1, 2)"
    environment = {**os.environ, "POSTTRAIN_FAULT": f"{fault}@2", "PYTHONPATH": str(here.parent)}
    done = subprocess.run([sys.executable, "-c", program, uri], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        ("checkpoint.after_tensors", 1),
        ("publish.before_manifest", 1),
        ("publish.before_commit", 1),
        ("publish.after_commit", 2),
    ],
)
def test_kill_minus_nine_leaves_a_whole_checkpoint(tmp_path, fault, step):
    uri = str(tmp_path / "checkpoints")
    run_until_killed(uri, fault)
    saved = checkpoints(uri)
    assert_is(saved.latest(), step)
    save(saved, 2, 3)
    assert_is(saved.latest(), 3)


def test_kill_minus_nine_leaves_a_whole_checkpoint_on_s3(s3_bucket):
    for fault, step in (("publish.before_commit", 1), ("publish.after_commit", 2)):
        uri = f"{s3_bucket}/{fault}"
        run_until_killed(uri, fault)
        assert_is(checkpoints(uri).latest(), step)
