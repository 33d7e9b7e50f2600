"""A larger vocabulary than the checkpoint's: how many rows, and what stands in the new ones.

A new row is the mean of the old ones: its logit then lies below the log-sum-exp of the old logits, so that
the distribution over old tokens hardly moves before training (Hewitt 2021, "Initializing New Word Embeddings").
"""

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from posttrain.errors import ModelError
from posttrain.model.families import DecoderConfig
from posttrain.model.tensor_file import TensorFile

_CHUNK_ELEMENTS = 1 << 23  # 32 MiB of float32


def grow(config: DecoderConfig, vocab_size: int) -> DecoderConfig:
    """The same model with `vocab_size` tokens.

    Raises:
        ModelError: fewer than it has; rows of a trained vocabulary are not thrown away.
    """
    if vocab_size < config.vocab_size:
        raise ModelError(
            f"vocab_size {vocab_size} is smaller than the model's {config.vocab_size}; a vocabulary only grows. "
            f"Fix: give at least {config.vocab_size}"
        )
    return replace(config, vocab_size=vocab_size)


def mean_row(file: TensorFile, name: str) -> Tensor:
    """Mean of the rows of a matrix [V, d], as [d] float32 on the CPU; read a chunk at a time.

    Every rank that holds new rows takes it over the whole file, in one order: it does not depend on the sharding.
    """
    rows, *columns = file.shapes[name]
    step = max(_CHUNK_ELEMENTS // prod(columns), 1)
    total = torch.zeros(columns, dtype=torch.float32)
    for start in range(0, rows, step):
        total += file.read(name, start, min(start + step, rows)).float().sum(0)
    return total / rows
