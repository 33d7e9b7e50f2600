"""A module for the model's front (`method.side`): numbers beside the tokens become what is added to their embeddings.

Yours may be any torch module that is called with the hidden size, names its `features`, and maps [T, F] float32 to
[T, hidden_size]; NaN is what a token does not have. Number a category's values, and give it an nn.Embedding.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn


class EventNumbers(nn.Module):
    """A linear map of log(1 + |x|), with x's sign, and of whether x is there; zero where nothing is."""

    features: ClassVar[tuple[str, ...]] = ("gap_minutes", "last_watch_hours")

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2 * len(self.features), hidden_size) * 0.02)

    def forward(self, features: Tensor) -> Tensor:
        known = ~features.isnan()
        numbers = features.nan_to_num()
        scaled = numbers.sign() * numbers.abs().log1p()
        return torch.cat((scaled, known.to(scaled.dtype)), dim=1).to(self.weight.dtype) @ self.weight
