"""Batch -> what the losses read. The only place where logits become logprobs, and never as [T, V]."""

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.data.types import Batch
from posttrain.model.decoder import Decoder

CHUNK_ROWS = 1024
"""Rows of logits held at once: 1024 x 151,936 float32 is 0.6 GiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Per-token results on the N positions that carry loss, aligned with batch.loss_idx."""

    logprobs: Tensor
    """[N] float32, nats, log p(target | prefix); differentiable."""
    entropy: Tensor
    """[N] float32, nats, of the next-token distribution; a measurement, without gradient."""


class ChunkedLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight^T / temperature)[target], a chunk of rows at a time.

    The backward recomputes a chunk's logits instead of keeping them, so memory is
    CHUNK_ROWS x V whatever N is. Gradient: d logprob / d logits = onehot - softmax.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, temperature: float):
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        for start in range(0, len(targets), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            log_p = _log_probs(hidden[rows], weight, vocab_size, temperature)
            logprobs[rows] = log_p.gather(-1, targets[rows, None]).squeeze(-1)
            entropy[rows] = -(log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.vocab_size, ctx.temperature = vocab_size, temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, *grads):
        hidden, weight, targets = ctx.saved_tensors
        grad_logprobs = grads[0]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(targets), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            grad_logits = -_log_probs(hidden[rows], weight, ctx.vocab_size, ctx.temperature).exp()
            grad_logits.scatter_add_(-1, targets[rows, None], torch.ones_like(grad_logits[:, :1]))
            grad_logits.mul_(grad_logprobs[rows, None] / ctx.temperature)
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[rows] = grad_logits @ weight[: ctx.vocab_size]
            grad_weight[: ctx.vocab_size] += (grad_logits.T @ hidden[rows]).float()
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _log_probs(hidden: Tensor, weight: Tensor, vocab_size: int, temperature: float) -> Tensor:
    """[rows, vocab_size] float32; the rows that pad the vocabulary are cut before the softmax."""
    logits = (hidden @ weight.T)[:, :vocab_size]
    return torch.log_softmax(logits.float() / temperature, dim=-1)


def forward(model: Decoder, batch: Batch, *, temperature: float = 1.0) -> Output:
    """Run the model once and score the targets that carry loss.

    Args:
        temperature: the one the targets were sampled at, so that logprobs compare with
            the sampler's; 1 for everything but rollouts.
    """
    hidden = model(batch)[batch.loss_idx]
    targets = batch.target_ids[batch.loss_idx]
    logprobs, entropy = ChunkedLogprobs.apply(
        hidden, model.output_head.weight, targets, model.config.vocab_size, temperature
    )
    return Output(logprobs=logprobs, entropy=entropy)


@torch.no_grad()
def logits(model: Decoder, batch: Batch) -> Tensor:
    """Raw [T, vocab_size] logits of a small batch, for comparing models; never used in training."""
    return (model(batch) @ model.output_head.weight.T)[:, : model.config.vocab_size]
