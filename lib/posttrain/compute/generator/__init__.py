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
    """Of the weights that made each token; it rises within a completion where a sync came between two tokens."""
    finish_reason: str
    """"stop" or "length"."""


class Generator(Protocol):
    """Holds one copy of the policy's weights and samples from it.

    Made as `cls(model_uri=…, stop_ids=…, pad_id=…)` in a process of its own. Several threads may call generate() at
    once, and sync() while they wait: an engine that cannot update running requests holds a lock.
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


class Sleeper(Protocol):
    """What a generator also has that can give its GPU's memory back while the policy trains."""

    def sleep(self) -> None:
        """Drop weights and cache, keep requests; nothing is sampled until a sync has followed wake()."""
        ...

    def wake(self) -> None:
        """Take the memory for weights again, for the sync that follows."""
        ...
