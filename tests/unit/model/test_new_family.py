"""The guide to a new family is true: its example, run as it stands in the page, is the model that it says."""

import json
import re
from pathlib import Path

import pytest

from posttrain.errors import ModelError
from posttrain.model import families
from posttrain.model.families import DecoderConfig
from posttrain.model.verify import compare_with_transformers
from steps.verify import verify
from tiny_families import random_config, random_model

PAGE = (Path(__file__).parents[3] / "docs" / "new_family.md").read_text()
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)

GEMMA_2B = {
    "model_type": "gemma",
    "num_hidden_layers": 18,
    "hidden_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 16384,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "hidden_act": "gelu",
    "rope_theta": 10000.0,
    "pad_token_id": 0,
}


def define(monkeypatch, example=EXAMPLE):
    """Run the page's example where it belongs, for one test."""
    known = dict(families.FAMILIES)
    monkeypatch.setattr(families, "FAMILIES", known)
    exec(compile(example, "docs/new_family.md", "exec"), {**vars(families), "FAMILIES": known})


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GEMMA_2B))
    return str(path)


@pytest.mark.parametrize("seed", range(5))
def test_the_example_agrees_with_transformers_on_random_configs(tmp_path, monkeypatch, seed):
    define(monkeypatch)
    drawn = random_config("llama", seed) | {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}
    compare_with_transformers(random_model(drawn, tmp_path, seed=seed, std=0.1), seed=seed, gradients=True)


def test_the_example_makes_the_command_green_that_refused_before(config, monkeypatch):
    with pytest.raises(ModelError, match="model_type 'gemma' is not defined here"):
        verify(config)
    define(monkeypatch)
    found = verify(config)
    assert found["family"] == "gemma" and found["transformers"]["max_abs_diff"] <= 1e-4


@pytest.mark.parametrize(
    ("forgotten", "module"),
    [
        ('"norm_offset": 1.0', "layers.0.attention_norm (model.layers.0.input_layernorm)"),
        ('"embedding_scale": config.hidden_size**0.5,', "embedding (model.embed_tokens)"),
    ],
)
def test_what_is_forgotten_is_named(config, monkeypatch, forgotten, module):
    assert EXAMPLE.count(forgotten) == 1
    define(monkeypatch, EXAMPLE.replace(forgotten, ""))
    with pytest.raises(ModelError, match=re.escape(f"the first module that differs: {module}")) as caught:
        verify(config)
    assert str(caught.value).startswith(f"{config}, seed 0: logits differ from transformers by ")


def test_the_checklist_names_every_flag():
    sizes = {"family", "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "mlp_size", "norm_eps"}
    flags = DecoderConfig.__dataclass_fields__.keys() - sizes - {"max_length", "heads", "lm_head"}
    checklist = PAGE.partition("## 1. Read")[2].partition("## 2. Define")[0]
    assert flags <= set(re.findall(r"`(\w+)`", checklist))
