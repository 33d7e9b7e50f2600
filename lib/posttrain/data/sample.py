"""Tokens and a mask become a Sample. The only causal shift in the repository."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain.data.types import Sample
from posttrain.errors import DataError


def shift(
    tokens: Sequence[int] | np.ndarray, loss_mask: Sequence[float] | np.ndarray, **columns: Sequence[float]
) -> Sample:
    """Align every per-token column with the token it describes.

    Args:
        tokens: [L+1] ids of the whole sequence, prompt and completion.
        loss_mask: [L+1] loss weight of each token; 0 where it is not trained.
        columns: [L+1] more floats per token: sampler_logprobs, advantages.

    Raises:
        DataError: lengths differ, or no token after the first carries loss.
    """
    for name, column in {"loss_mask": loss_mask, **columns}.items():
        if len(column) != len(tokens):
            raise DataError(f"{name} has {len(column)} entries for {len(tokens)} tokens; every column is per token")
    mask = np.asarray(loss_mask, np.float32)[1:]
    if not mask.any():
        raise DataError(f"no trained token among {len(tokens)}; check the chat template and the message roles")
    ids = np.asarray(tokens, np.int32)
    shifted: dict[str, Any] = {name: np.asarray(column, np.float32)[1:] for name, column in columns.items()}
    return Sample(input_ids=ids[:-1], target_ids=ids[1:], loss_mask=mask, **shifted)
