"""The smallest real model folder: a tokenizer trained in milliseconds and a two-layer Qwen3 of random weights."""

from pathlib import Path

from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.train_tokenizer import train_tokenizer
from posttrain.model.build import build_model, fresh_config

TEXTS = ["user\nsort 3141592\n", "assistant\n1123459\n", "system\nAnswer with the digits only.\n"]
"""What the tokenizer has seen: the built-in task's own words."""


def tiny_tokenizer(folder: str | Path) -> BaseHFModelTokenizer:
    """Train a byte-level tokenizer into `folder` and open it as a run would."""
    train_tokenizer(TEXTS, folder, vocab_size=300)
    return BaseHFModelTokenizer(folder)


def tiny_model(folder: str | Path, *, seed: int = 0) -> Path:
    """A folder with a tokenizer and a model drawn from `seed`: what `model.path` may name."""
    shape = fresh_config(
        vocab_size=tiny_tokenizer(folder).vocab_size,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_size=64,
        max_length=128,
    )
    build_model(folder, shape, seed=seed)
    return Path(folder)
