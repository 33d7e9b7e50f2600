"""What a forward pass hands to a loss."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Per-token results on the N positions that carry loss, aligned with batch.loss_idx, and per-document scores."""

    logprobs: Tensor
    """[N] float32, nats, log p(target | prefix); differentiable."""
    entropy: Tensor
    """[N] float32, nats, of the next-token distribution; a measurement, without gradient."""
    teacher_logprobs: Tensor | None = None
    """[N, K] float32, nats, log p(batch.teacher_ids | prefix) under this model; differentiable."""
    values: Tensor | None = None
    """[N] float32, what the head `value` expects before each target is chosen; differentiable."""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """[S, k] float32 each: what the head of that name says of every document, at its last token; differentiable."""
