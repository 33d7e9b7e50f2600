"""Losses: (Output, Batch) -> sums over loss tokens. The engine divides, once, by the global count."""

from typing import Protocol

from torch import Tensor

from posttrain.data.types import Batch
from posttrain.model.forward import Output


class Loss(Protocol):
    """A weighted sum over loss tokens, so that packing and accumulation cannot change the step."""

    @property
    def temperature(self) -> float:
        """Temperature that the batch's targets were sampled at."""
        ...

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss sum with gradient, and metric sums in the same unit (per loss token) without."""
        ...
