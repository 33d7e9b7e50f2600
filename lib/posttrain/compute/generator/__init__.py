"""The generator: what turns prompts into sampled tokens. A user may bring their own by import path."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion to sample. Its seed alone decides the noise, whatever engine or batch it lands in."""

    token_ids: tuple[int, ...]
    seed: int
    """64 bits, derived from (run seed, prompt uid, sample index, attempt)."""
    temperature: float
    """0 takes the likeliest token."""
    max_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the generator made of a Request."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """nats, at the request's temperature (at 1 when it is 0)."""
    versions: tuple[int, ...]
    finish_reason: str
    """"stop" or "length"."""


class Generator(Protocol):
    """Holds one copy of the policy's weights and samples from it.

    Made as `cls(model_uri=…, stop_ids=…, pad_id=…)` in a process of its own. A class with the attribute
    `concurrency = N` gets up to N - 1 calls of generate() at once, each for one group, and sync() beside them; one
    without it gets a call at a time, for all groups that wait.
    """

    def weight_dtype(self) -> str:
        """Name of the dtype that sync() wants: "float32", "bfloat16"."""
        ...

    def sync(self, version: int, weights: Mapping[str, Tensor]) -> str:
        """Take weights under Hugging Face names; return digest() of what is now held."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Sample every request; results keep the requests' order."""
        ...
