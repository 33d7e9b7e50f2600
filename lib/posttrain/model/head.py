"""The LM head: hidden states and the head's matrix become logprobs or a loss, a chunk of rows at a time, never [T, V].

Two ways to a gradient. Where the loss is a sum over rows, each row's part a function of that row alone, a chunk's
logits serve once: statistics, loss, gradient in their place, and the two gradient matmuls, so a step costs the three
matmuls that any head costs. Where rows hang together (DPO), the backward makes the logits again: a fourth matmul.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.model.softmax import softmax_gradient_, softmax_stats

CHUNK_ROWS = 3072
"""Most rows of logits held at once: 3072 x 151,936 bfloat16 is 0.87 GiB. Fewer rows make the gradient of the weight,
which is read and written once a chunk, cost more (benchmarks/lm_head.py)."""

ChunkLoss = Callable[[slice, Tensor, Tensor], Tensor]
"""(rows, logprobs [n, K] with gradient, entropy [n]) -> the chunk's part of the loss sum."""

Distance = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(rows, student's logits [n, V], teacher's [n, V]) -> loss sum, and its gradient with respect to the student's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What turns hidden states into logits."""

    vocab_size: int
    """Columns that mean a token; the matrix may have more rows, which get no probability and no gradient."""
    temperature: float = 1.0


def logprobs_and_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """log softmax(hidden weight^T / temperature) at K tokens a row, [N, K] float32, and the entropy [N] float32, nats.

    Differentiable in hidden and weight; the entropy is a measurement without gradient.

    Args:
        hidden: [N, d].
        weight: [V, d], V at least head.vocab_size.
        targets: [N, K] int64.
    """
    return _Logprobs.apply(hidden, weight, targets, head)  # pyright: ignore[reportReturnType]


def row_loss(hidden: Tensor, weight: Tensor, targets: Tensor, head: Head, chunk_loss: ChunkLoss) -> Tensor:
    """A loss that is a sum over rows, scalar float32, its gradients made here, in the forward.

    They are final: the loss is to be backpropagated as it is, and one that was scaled since is refused. A factor
    belongs into chunk_loss, where it costs nothing.

    Args:
        chunk_loss: called once a chunk, in order; may keep metrics on the side.
    """
    return _RowLoss.apply(hidden, weight, targets, head, chunk_loss)  # pyright: ignore[reportReturnType]


def divergence_loss(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, head: Head, distance: Distance
) -> Tensor:
    """A distance between two models' distributions at every row, scalar float32; the teacher gets no gradient.

    Args:
        teacher_hidden: [N, d'], the teacher's hidden states at the same rows.
        teacher_weight: [V', d'], V' at least head.vocab_size.
    """
    return _Divergence.apply(hidden, weight, teacher_hidden, teacher_weight, head, distance)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def top_logprobs(hidden: Tensor, weight: Tensor, head: Head, *, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of every row, [N, k] int64, the likeliest first, and their logprobs [N, k] float32, nats.

    Args:
        hidden: [N, d].
        weight: [V, d], V at least head.vocab_size; other rows are no tokens.
    """
    ids = torch.empty((len(hidden), k), dtype=torch.int64, device=hidden.device)
    logprobs = torch.empty((len(hidden), k), dtype=torch.float32, device=hidden.device)
    for rows, logits in _chunks(hidden, weight):
        lse, _ = softmax_stats(logits, **_facts(head))
        ids[rows] = logits[:, : head.vocab_size].topk(k, dim=-1).indices
        logprobs[rows] = _at(logits, ids[rows], lse, head)
    return ids, logprobs


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, head: Head):
        logprobs = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for rows, logits in _chunks(hidden, weight):
            lse, entropy[rows] = softmax_stats(logits, **_facts(head))
            logprobs[rows] = _at(logits, targets[rows], lse, head)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.head = head
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, *grads):
        hidden, weight, targets = ctx.saved_tensors
        gradients = _Gradients(hidden, weight, wanted=ctx.needs_input_grad)
        for rows, logits in _chunks(hidden, weight):
            lse, _ = softmax_stats(logits, **_facts(ctx.head))
            softmax_gradient_(logits, lse, grads[0][rows], targets[rows], **_facts(ctx.head))
            gradients.add(rows, logits)
        return (*gradients.taken(None), None, None)


class _RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, head: Head, chunk_loss: ChunkLoss):
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = _Gradients(hidden, weight, wanted=ctx.needs_input_grad)
        for rows, logits in _chunks(hidden, weight):
            lse, entropy = softmax_stats(logits, **_facts(head))
            logprobs = _at(logits, targets[rows], lse, head).requires_grad_()
            with torch.enable_grad():
                part = chunk_loss(rows, logprobs, entropy)
            loss += part.detach()
            if not gradients.wanted:
                continue
            (upstream,) = torch.autograd.grad(part, logprobs)
            softmax_gradient_(logits, lse, upstream, targets[rows], **_facts(head))
            gradients.add(rows, logits)
        ctx.gradients = gradients
        return loss

    @staticmethod
    def backward(ctx, *grads):
        return (*ctx.gradients.taken(grads[0]), None, None, None)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, head: Head, distance: Distance):
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = _Gradients(hidden, weight, wanted=ctx.needs_input_grad)
        # The distance keeps some four float32 copies of a chunk: with an eighth of the rows they fit in 1 GiB.
        for rows, logits in _chunks(hidden, weight, size=CHUNK_ROWS // 8):
            theirs = teacher_hidden[rows] @ teacher_weight.T
            part, gradient = distance(rows, logits[:, : head.vocab_size], theirs[:, : head.vocab_size])
            loss += part
            logits[:, : head.vocab_size] = gradient
            logits[:, head.vocab_size :] = 0
            gradients.add(rows, logits)
        ctx.gradients = gradients
        return loss

    @staticmethod
    def backward(ctx, *grads):
        return (*ctx.gradients.taken(grads[0]), None, None, None, None)


class _Gradients:
    """Gradients of hidden [N, d] and weight [V, d], filled from chunks of the logits' gradient."""

    def __init__(self, hidden: Tensor, weight: Tensor, *, wanted: tuple[bool, ...]):
        self._inputs, self.wanted = (hidden, weight), any(wanted[:2])
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.empty_like(weight) if wanted[1] else None
        self._first = True

    def add(self, rows: slice, grad_logits: Tensor) -> None:
        hidden, weight = self._inputs
        if self.hidden is not None:
            torch.mm(grad_logits, weight, out=self.hidden[rows])
        if self.weight is not None and self._first:
            torch.mm(grad_logits.T, hidden[rows], out=self.weight)
            self._first = False
        elif self.weight is not None:
            # Summed in the weight's dtype: one rounding a chunk, in bfloat16 about as much as the gradient's own.
            self.weight.addmm_(grad_logits.T, hidden[rows])

    def taken(self, upstream: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Both, once. The loss they belong to must have reached the root of backward() unscaled: scaling a matrix
        of V x d here would cost as much as a tenth of the head's matmuls."""
        if upstream is not None:
            torch._assert_async(upstream == 1, "a loss whose gradients were made in the forward was scaled afterwards")
        hidden, weight = self.hidden, self.weight
        self.hidden = self.weight = None
        if weight is not None and self._first:
            weight.zero_()  # no row carried loss
        return hidden, weight


def _chunks(hidden: Tensor, weight: Tensor, *, size: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and their logits [n, V] in a buffer that the next chunk uses again."""
    count = max(1, -(-len(hidden) // (size or CHUNK_ROWS)))
    size = -(-max(1, len(hidden)) // (8 * count)) * 8  # even chunks: a short last one would use the matmuls badly
    buffer = torch.empty((size, len(weight)), dtype=hidden.dtype, device=hidden.device)
    for start in range(0, len(hidden), size):
        rows = slice(start, min(start + size, len(hidden)))
        yield rows, torch.mm(hidden[rows], weight.T, out=buffer[: rows.stop - start])


def _at(logits: Tensor, targets: Tensor, lse: Tensor, head: Head) -> Tensor:
    """Logprobs [n, K] float32 of the targets."""
    return logits.gather(1, targets).float() / head.temperature - lse[:, None]


def _facts(head: Head) -> dict[str, Any]:
    return {"vocab_size": head.vocab_size, "temperature": head.temperature}
