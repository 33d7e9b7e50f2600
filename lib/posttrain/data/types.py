"""The nouns of the data line, each defined once: Row, Sample, Unit, Pack, Batch, Rollout.

Axes: L tokens of one sample, T tokens of a pack, D documents (samples) of a pack,
N positions of a pack that carry loss. Every [L] and [T] column is already shifted:
index t holds what is known or wanted about target_ids[t], the token after
input_ids[t]. The shift happens once, in data/sample.py, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # a process that runs rewards reads Row and Rollout alone, and starts sooner without torch
    import torch
    from torch import Tensor

Row = dict[str, Any]
"""One record as it came from a source: `messages`, or `prompt` and verifier fields."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One tokenized sequence, ready to pack.

    Example:
        prompt [7, 8], completion [9, 2] ->
        input_ids [7, 8, 9], target_ids [8, 9, 2], loss_mask [0., 1., 1.]
    """

    input_ids: np.ndarray
    """[L] int32, tokens the model reads."""
    target_ids: np.ndarray
    """[L] int32, the token after each input."""
    loss_mask: np.ndarray
    """[L] float32, weight of the target in the loss; 0 where it is not trained."""
    sampler_logprobs: np.ndarray | None = None
    """[L] float32, nats, under the policy that sampled the target; 0 off the mask."""
    advantages: np.ndarray | None = None
    """[L] float32, reward units after group centering; 0 off the mask."""
    ref_logprobs: np.ndarray | None = None
    """[L] float32, nats, under the frozen reference, where it was asked before the step; 0 off the mask."""
    values: np.ndarray | None = None
    """[L] float32, what the value head expected before each target was chosen; 0 off the mask."""
    returns: np.ndarray | None = None
    """[L] float32, what the value head is fitted to; 0 off the mask."""
    teacher_ids: np.ndarray | None = None
    """[M, K] int32, of the M targets that carry loss alone: the tokens that a teacher held likeliest."""
    teacher_logprobs: np.ndarray | None = None
    """[M, K] float32, nats, what the teacher gave them."""
    allowed_ids: np.ndarray | None = None
    """[M, K] int32, of those targets: the tokens that the sampler could choose from, filled up with -1."""
    features: np.ndarray | None = None
    """[L, F] float32, of each input token: what an embedding reads beside it; NaN where there is none."""
    labels: np.ndarray | None = None
    """[L, K] float32, what heads are to say where the target is the end of an answer; NaN where nothing is asked."""
    fields: dict[str, float] = field(default_factory=dict)
    """One number each for the whole document: a label, a reference's logprob, a margin."""

    def __len__(self) -> int:
        return len(self.input_ids)


Unit = tuple[Sample, ...]
"""Samples that must share a pack: (s,) for SFT and RL, (chosen, rejected) for pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """Samples laid end to end, at most T tokens in all; what travels to a rank."""

    samples: tuple[Sample, ...]
    """In unit order; a unit is never split over packs."""
    num_units: int
    draws: tuple[int, ...] = ()
    """Draw number of each unit, where units come from a mixture."""

    @property
    def num_tokens(self) -> int:
        return sum(len(sample) for sample in self.samples)

    @property
    def loss_tokens(self) -> float:
        """Sum of loss weights: the pack's share of the loss denominator."""
        return float(sum(sample.loss_mask.sum(dtype=np.float64) for sample in self.samples))


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank of a context group computes of a Batch: indices, made on the host (data/context.py)."""

    chunks: tuple[tuple[int, int], tuple[int, int]]
    """Where its two runs of tokens begin and end in the pack."""
    token_idx: Tensor
    """[T / ranks] int64, its tokens, ascending."""
    row_idx: Tensor
    """[M] int64, which of the batch's N loss positions are among them."""
    row_at: Tensor
    """[M] int64, where among its tokens those are."""
    sample_idx: Tensor
    """[K] int64, which of the S samples have their last token among them."""
    sample_at: Tensor
    """[K] int64, where among its tokens those are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One pack as tensors of fixed T, flat (no batch dimension), on one device."""

    input_ids: Tensor
    """[T] int64; 0 on the padded tail."""
    target_ids: Tensor
    """[T] int64."""
    position_ids: Tensor
    """[T] int64, restarts at 0 in every document."""
    doc_id: Tensor
    """[T] int64, index of the token's document; the padded tail comes last."""
    cu_seqlens: Tensor
    """[D+1] int32, document boundaries, those of the padded tail included."""
    loss_idx: Tensor
    """[N] int64, positions whose target carries loss, ascending."""
    loss_mask: Tensor
    """[N] float32, loss weight of those positions."""
    max_doc_len: int
    """Tokens of the longest document, known on the host."""
    num_samples: int = 0
    """S, documents that are samples; those of the padded tail come after them."""
    sampler_logprobs: Tensor | None = None
    """[N] float32, nats."""
    ref_logprobs: Tensor | None = None
    """[N] float32, nats, under the frozen reference; filled in on the rank that holds it."""
    advantages: Tensor | None = None
    """[N] float32."""
    values: Tensor | None = None
    """[N] float32, of the value head before this step."""
    returns: Tensor | None = None
    """[N] float32, what the value head is fitted to."""
    teacher_ids: Tensor | None = None
    """[N, K] int64, the tokens that a teacher holds likeliest at each position."""
    teacher_logprobs: Tensor | None = None
    """[N, K] float32, nats, what the teacher gives them."""
    allowed_ids: Tensor | None = None
    """[N, K] int64, tokens that the policy may choose from, filled up with -1; a row of -1 is any."""
    features: Tensor | None = None
    """[T, F] float32, NaN where a token has none, as on the padded tail."""
    label_idx: Tensor | None = None
    """[M] int64, positions with a label, ascending."""
    labels: Tensor | None = None
    """[M, K] float32, NaN where one of several is missing."""
    fields: dict[str, Tensor] = field(default_factory=dict)
    """[S] float32 each, one number a sample, in the order of doc_id; none for the padded tail."""
    share: Share | None = None
    """Of the rank that has the batch, where tokens are split over ranks; every other column is whole on all of them."""

    def rows(self, chosen: slice | Tensor) -> Batch:
        """The same batch with its [N] columns cut to `chosen`: what a loss reads of a chunk of loss rows."""
        names = ("loss_idx", "loss_mask", "sampler_logprobs", "ref_logprobs", "advantages")
        names += ("values", "returns", "teacher_ids", "teacher_logprobs", "allowed_ids")
        columns = {name: getattr(self, name) for name in names}
        return replace(self, **{name: column[chosen] for name, column in columns.items() if column is not None})

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return _moved(self, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question put to the generator, with what its reward needs."""

    uid: int
    """Draw number: unique in the run, and the root of its samples' seeds."""
    token_ids: tuple[int, ...]
    row: Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled completion of a prompt. Token ids in, token ids out; never re-tokenised text.

    Example:
        prompt (7, 8), sampled 9 then the stop token 2 ->
        token_ids (9, 2), logprobs (-0.3, -0.1), versions (4, 4), finish_reason "stop"
    """

    prompt: Prompt
    sample_index: int
    token_ids: tuple[int, ...]
    """[C] the completion, its stop token included when it was sampled."""
    logprobs: tuple[float, ...]
    """[C] nats, under the distribution that was sampled from (temperature applied)."""
    versions: tuple[int, ...]
    """[C] weight version that made each token."""
    finish_reason: str
    """"stop" or "length"."""
    text: str = ""
    """Decoded completion without special tokens, for rewards and people."""
    reward: float | None = None
    """None until scored; a failed reward drops the group and is never 0."""
    parts: dict[str, float] = field(default_factory=dict)
    """Named components of the reward."""
    loss_mask: tuple[float, ...] | None = None
    """[C] 0 on tokens that an environment wrote, else 1; None is 1 everywhere."""
    turns: tuple[dict[str, str], ...] = ()
    """The messages after the prompt, where an environment took part: the policy's and the environment's."""
    latency_s: float = 0.0
    """Seconds from when its group was asked for to when it was sampled."""


def _moved(value: Any, device: torch.device | str) -> Any:
    """Every tensor of a value on `device`."""
    from torch import Tensor

    match value:
        case Tensor():
            return value.to(device, non_blocking=True)
        case dict():
            return {key: _moved(each, device) for key, each in value.items()}
        case Batch() | Share():
            return type(value)(**{name: _moved(getattr(value, name), device) for name in value.__dataclass_fields__})
        case _:
            return value
