"""The generator: what turns prompts into sampled tokens. A user may bring their own by import path."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from posttrain.compute.weight_transfer import Packed


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

    Made as `cls(model_uri=…, stop_ids=…, pad_id=…)` in a process of its own, with `constraint=…` too where the
    environment has one, which it then obeys (data/constraint.py). A class with the attribute
    `concurrency = N` gets up to N - 1 calls of generate() at once, each for one group, and sync() beside them; one
    without it gets a call at a time, for all groups that wait.

    A class with the attribute `max_adapter_rank = R` is sent the adapters of a policy that trains some of at most that
    rank: in its first sync beside the weights that they stand beside, later alone (compute/weight_sync.py names them).
    One without it gets all weights each time, adapters merged into theirs.
    """

    def weight_dtype(self) -> str:
        """Name of the dtype that sync() wants: "float32", "bfloat16"."""
        ...

    def sync(self, version: int, weights: Mapping[str, Tensor]) -> str:
        """Take weights under Hugging Face names, and keep others; return digest() of what is now held of them."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Sample every request; results keep the requests' order."""
        ...


class BucketGenerator(Generator, Protocol):
    """A generator that also takes weights on its GPU, a bucket at a time (compute/weight_transfer.py)."""

    def gpu(self) -> str:
        """The GPU that it computes on."""
        ...

    def workers(self) -> int:
        """Processes that each take part in a broadcast."""
        ...

    def join(self, address: str, first_rank: int, world_size: int, timeout_s: float) -> None:
        """Meet the policy's rank 0 in a process group."""
        ...

    def begin_sync(self, version: int) -> None:
        """Stop between two tokens."""
        ...

    def load_bucket(self, packed: Sequence[Packed], handle: Any = None) -> None:
        """Take what is broadcast now, or what lies behind the handle of a bucket on the same GPU."""
        ...

    def end_sync(self) -> str:
        """Go on; digest() of what is now held."""
        ...

    def sleep(self) -> None:
        """Give the GPU's memory back, keep requests; the next sync takes it again."""
        ...
