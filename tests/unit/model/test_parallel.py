"""How a decoder is split: what cannot be is refused, and at 256 ranks each holds what is computed here by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.model.families import decoder_config
from posttrain.model.parallel import unfit
from tiny_families import random_config

TESTS = Path(__file__).parents[2]
QWEN3_0P6B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


@pytest.mark.parametrize("sizes", [{"data": 32, "tensor": 8}, {"data": 4, "context": 8, "tensor": 8}])
def test_256_ranks_hold_their_256th_of_a_model_but_for_norms(sizes, tmp_path: Path):
    """Of rank 100 the place in its tensor group is 4; FSDP shards over the 32 others, share they tokens or not."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_0P6B))
    sizes = json.dumps(sizes)
    command = [sys.executable, str(TESTS / "fake_mesh.py"), str(tmp_path / "config.json"), sizes, "0", "100", "255"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {  # rows or columns cut by 8, then rows by 32; what is outside blocks by 256, a norm in blocks by 32
        "embedding.weight": [151936 // 256 + (151936 % 256 > 0), 1024],
        "norm.weight": [4],
        "layers.27.attention_norm.weight": [32],
        "layers.27.mlp_norm.weight": [32],
        "layers.27.attention.q_proj.weight": [2048 // 8 // 32, 1024],
        "layers.27.attention.k_proj.weight": [1024 // 8 // 32, 1024],
        "layers.27.attention.v_proj.weight": [1024 // 8 // 32, 1024],
        "layers.27.attention.o_proj.weight": [1024 // 32, 2048 // 8],
        "layers.27.attention.q_norm.weight": [4],
        "layers.27.attention.k_norm.weight": [4],
        "layers.27.mlp.gate_proj.weight": [3072 // 8 // 32, 1024],
        "layers.27.mlp.up_proj.weight": [3072 // 8 // 32, 1024],
        "layers.27.mlp.down_proj.weight": [1024 // 32, 3072 // 8],
    }
    for rank, found in json.loads(done.stdout).items():
        shapes = {name: shape for name, (shape, _) in found.items()}
        rest = {"embedding.weight": [151936 - 255 * 594, 1024]} if rank == "255" else {}
        assert {name: shapes[name] for name in expected} == expected | rest, f"rank {rank}"
        # Of a layer: hidden x (q + k + v + o + 3 MLP) / 256, and norms, (2 x hidden + 2 x head_dim) / 32; in float32.
        matrices = 4 * 1024 * (2048 + 1024 + 1024 + 2048 + 3 * 3072) // 256
        norms = 4 * (2 * 1024 + 2 * 128) // 32
        outside = 4 * (4 + 1024 * (rest or expected)["embedding.weight"][0])
        assert sum(size for _, size in found.values()) == 28 * (matrices + norms) + outside


@pytest.mark.parametrize(
    ("tensor", "changes", "words"),
    [
        (4, {"num_attention_heads": 8, "num_key_value_heads": 2}, "2 key and value heads"),
        (3, {"num_attention_heads": 8, "num_key_value_heads": 2}, "8 query heads"),
        (2, {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 33}, "33 columns of its MLP"),
    ],
)
def test_heads_and_columns_that_cannot_be_shared_are_refused(tensor, changes, words):
    config = decoder_config(random_config("llama", 0) | {"hidden_size": 64} | changes)
    line = f"parallel.tensor = {tensor} does not divide the model's {words}; choose a divisor"
    assert line in unfit(config, tensor=tensor)
    assert unfit(config, tensor=1) == []


def test_experts_that_cannot_be_dealt_out_are_refused():
    config = random_config("qwen3_moe", 0) | {"num_attention_heads": 8, "num_key_value_heads": 4, "num_experts": 2}
    config |= {"num_experts_per_tok": 1, "mlp_only_layers": [], "decoder_sparse_step": 1}
    (line,) = unfit(decoder_config(config), tensor=4)
    assert "2 experts" in line


def test_dora_is_refused_where_rows_are_cut():
    (line,) = unfit(decoder_config(QWEN3_0P6B), tensor=2, dora=True)
    assert "DoRA" in line and unfit(decoder_config(QWEN3_0P6B), tensor=2) == []


def test_experts_are_dealt_out_by_one_rule_only():
    config = random_config("qwen3_moe", 0) | {"num_attention_heads": 8, "num_key_value_heads": 4, "num_experts": 4}
    config = decoder_config(config | {"mlp_only_layers": [], "decoder_sparse_step": 1})
    assert unfit(config, tensor=1, expert=4) == []
    assert "3 does not divide the model's 4 experts" in unfit(config, tensor=1, expert=3)[0]
    assert "both deal out the experts" in unfit(config, tensor=2, expert=2)[0]
