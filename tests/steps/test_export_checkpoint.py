"""A committed checkpoint opens in transformers with the weights that were trained, whoever wrote it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain import storage
from posttrain.compute.committed import open_checkpoint, sealed
from posttrain.errors import CheckpointError, DamagedError
from posttrain.model.load import load_decoder
from posttrain.model.weights import hf_tensors
from saves import checkpoints, reports_of
from steps.export_checkpoint import export_checkpoint
from tiny import tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a model, and a checkpoint of two ranks whose weights have moved on; and those weights."""
    root = tmp_path_factory.mktemp("run")
    with storage.staging(str(root / "model")) as folder:
        tiny_model(folder)
        storage.publish(folder, str(root / "model"))
    trained = load_decoder(root / "model")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    held = {f"model.{name}": parameter.detach() for name, parameter in trained.named_parameters()}
    held |= {name.replace("model.", "optimizer.", 1) + ".exp_avg": tensor for name, tensor in held.items()}
    made_from = {"model_uri": str(root / "model"), "backend": "posttrain"}
    with checkpoints(root / "checkpoints" / "sft", made_from=made_from).writing() as saved:
        attempt = saved.begin(3, 1)
        shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
        saved.commit(attempt, shapes=shapes, reports=reports_of(held, attempt.folder, ranks=2), state={})
    return root, dict(hf_tensors(trained))


def assert_opens(out: Path, weights: dict[str, torch.Tensor]) -> None:
    opened = AutoModelForCausalLM.from_pretrained(out)
    found = opened.state_dict()
    for name, expected in weights.items():
        assert torch.equal(found[name], expected), name
    assert len(AutoTokenizer.from_pretrained(out)) == found["model.embed_tokens.weight"].shape[0]


def test_the_command_makes_a_folder_that_transformers_opens_with_equal_weights(run, tmp_path):
    root, weights = run
    step, out = str(root / "checkpoints" / "sft" / "step_000003"), tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.cli", "export", step, str(out), "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 3
    assert_opens(out, weights)
    again = subprocess.run(
        [sys.executable, "-m", "posttrain.cli", "export", step, str(out), "--json"], capture_output=True, text=True
    )
    assert again.returncode == 1 and "already published" in again.stderr


def test_a_run_that_was_moved_exports_too(run, tmp_path):
    root, weights = run
    shutil.copytree(root, tmp_path / "moved")
    step = tmp_path / "moved" / "checkpoints" / "sft" / "step_000003"
    manifest = step / "manifest.json"
    there = {**open_checkpoint(str(step)).manifest, "made_from": {"model_uri": "/gone/model", "backend": "posttrain"}}
    manifest.write_bytes(sealed(there))
    export_checkpoint(str(step), str(tmp_path / "out"))
    assert_opens(tmp_path / "out", weights)
    shutil.rmtree(tmp_path / "moved" / "model")
    with pytest.raises(CheckpointError, match="--model"):
        export_checkpoint(str(step), str(tmp_path / "other"))


@pytest.mark.fault("F25", outcome="REFUSE")
def test_a_flipped_bit_of_the_weights_is_not_exported(run, tmp_path):
    root, _ = run
    shutil.copytree(root, tmp_path / "copy")
    step = tmp_path / "copy" / "checkpoints" / "sft" / "step_000003"
    part = open_checkpoint(str(step)).index.tensors["model.norm.weight"].parts[0]
    data = bytearray((step / part.file).read_bytes())
    data[part.offset] ^= 1
    (step / part.file).write_bytes(data)
    with pytest.raises(DamagedError, match=r"model\.norm\.weight differs from its hash"):
        export_checkpoint(str(step), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_was_not_committed_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="never committed"):
        export_checkpoint(str(tmp_path), str(tmp_path / "out"))
