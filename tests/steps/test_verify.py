"""The verifier as a command: green for a right model, one line and status 1 for a wrong one, numbers for a program."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.errors import ComputeError, ConfigError, ModelError
from posttrain.model.random_model import small_config, write_random_model
from posttrain.storage import publish
from steps.verify import verify
from tiny_families import random_config

CONFIG = random_config("qwen3", 0) | {"vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28}
CONFIG |= {"layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 7}


@pytest.fixture
def config(tmp_path):
    """A config.json under another name, of a model far larger than what is compared."""
    path = tmp_path / "qwen.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    return write_random_model(tmp_path / "model", small_config(CONFIG), seed=0)


def posttrain(*words, cwd):
    command = [sys.executable, "-m", "posttrain.cli", "verify", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_a_config_is_compared_by_random_weights(config):
    found = verify(config, seeds=2)
    assert found["weights"] == "random" and found["seeds"] == 2 and found["family"] == "qwen3"
    assert found["tensors"] > 20
    numbers = found["transformers"]
    assert 0 < numbers["max_abs_diff"] <= numbers["tolerance"]
    assert 0 < numbers["gradient_diff"] <= numbers["gradient_tolerance"]


def test_a_folder_with_a_config_only_counts_as_one(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert verify(str(tmp_path))["transformers"] == verify(config)["transformers"]


def test_a_folder_with_weights_is_compared_as_it_is(folder):
    found = verify(str(folder), seeds=3)
    assert found["weights"] == "folder"
    assert found["transformers"]["max_abs_diff"] >= verify(str(folder))["transformers"]["max_abs_diff"]


def test_a_folder_on_s3_is_compared(folder, s3_bucket):
    local = verify(str(folder))
    publish(folder, f"{s3_bucket}/model")
    assert verify(f"{s3_bucket}/model")["transformers"] == local["transformers"]


def test_weights_that_cannot_be_read_are_not_replaced_by_random_ones(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        verify(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "mamba"}', "model_type 'mamba' is not defined here"),
        ("{", r"qwen\.json is not JSON"),
        (json.dumps(CONFIG | {"attention_dropout": 0.1}), "attention_dropout"),
        (json.dumps(CONFIG | {"architectures": ["Qwen3ForSequenceClassification"]}), "no logits"),
    ],
)
def test_a_config_that_is_no_decoder_is_refused(config, content, message):
    with open(config, "w") as file:
        file.write(content)
    with pytest.raises(ModelError, match=message):
        verify(config)


def test_an_unknown_peer_and_a_missing_path_are_refused():
    with pytest.raises(ConfigError, match="unknown 'vlm'; known: transformers, vllm"):
        verify("nowhere", against=("vlm",))
    with pytest.raises(ModelError, match="nowhere does not exist"):
        verify("nowhere")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_a_missing_vllm_is_refused_before_anything_is_compared():
    with pytest.raises(ComputeError, match=r"vllm is not installed. Fix: pip install 'posttrain\[vllm\]'"):
        verify("nowhere", against=("transformers", "vllm"))


def test_the_command_prints_a_table(config, tmp_path):
    done = posttrain("qwen.json", "--seeds", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "qwen.json: qwen3" in done.stdout and "Agrees with transformers" in done.stdout
    assert "gradient_diff" in done.stdout


def test_json_is_all_that_json_prints(folder, tmp_path):
    done = posttrain("model", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["transformers"]["top1_agreement"] == 1.0


def test_a_fault_in_the_decoder_is_an_error_that_names_the_module_and_status_1(folder, tmp_path):
    code = (
        "import sys, posttrain.model.attention as attention, posttrain.cli as cli\n"
        "attention.rotate = lambda x, cos, sin: x\n"
        "cli.main()"
    )
    command = [sys.executable, "-c", code, "verify", "model", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and not done.stdout and "Traceback" not in done.stderr
    assert "ModelError: model, seed 0: logits differ from transformers by " in done.stderr
    assert "the first module that differs: layers.0.attention (model.layers.0.self_attn), by " in done.stderr


def test_a_broken_folder_is_one_line_and_status_1(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    done = posttrain("model", cwd=tmp_path)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("ModelError: ") and done.stderr.count("\n") == 1
    assert "model.norm.weight has shape (3,)" in done.stderr
