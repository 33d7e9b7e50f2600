"""Softmax over a wide vocabulary without a second copy of the logits: its statistics, and its gradient in their place.

Three passes over [n, V] logits in their own dtype are all that a loss costs beside its matmuls: one here for
log-sum-exp and entropy, two for the gradient. On CUDA two Triton kernels, on a CPU plain torch.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

STATS = {"BLOCK": 2048, "num_warps": 4}
GRADIENT = {"BLOCK": 4096, "num_warps": 16}
"""Columns that a kernel's program holds at once, and its warps: the fastest of a sweep on an H100 at V = 151,936."""


def softmax_stats(logits: Tensor, *, vocab_size: int, temperature: float) -> tuple[Tensor, Tensor]:
    """log sum exp and entropy of softmax(logits / temperature), [n] float32 each, nats.

    Args:
        logits: [n, V], rows contiguous; columns from vocab_size on are padding and count for nothing.
    """
    if logits.is_cuda:
        lse, entropy = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
        if len(logits):
            stats, _ = _kernels()
            stats[(len(logits),)](logits, lse, entropy, logits.stride(0), vocab_size, 1 / temperature, **STATS)
        return lse, entropy
    scaled = _wide(logits[:, :vocab_size]) / temperature
    lse = scaled.logsumexp(-1)
    return lse.float(), (lse - ((scaled - lse[:, None]).exp_() * scaled).sum(-1)).float()


def softmax_gradient_(
    logits: Tensor, lse: Tensor, upstream: Tensor, targets: Tensor, *, vocab_size: int, temperature: float
) -> None:
    """Overwrite logits with the gradient of sum_ik upstream_ik log softmax(logits_i / temperature)[targets_ik].

    d / d logits_ij = (sum_k upstream_ik [targets_ik = j] - softmax_ij sum_k upstream_ik) / temperature; padding gets 0.

    Args:
        lse: [n] float32, of softmax_stats.
        upstream: [n, K] float32.
        targets: [n, K] int64; a token may occur twice in a row.
    """
    total = upstream.sum(-1)
    # At a target the two terms nearly cancel when the model is sure, so they meet in float32, not in the logits' dtype.
    share = (_wide(logits.gather(1, targets)) / temperature - lse[:, None]).exp()
    twice = (targets[:, :, None] == targets[:, None, :]).to(upstream.dtype)
    at_targets = ((twice @ upstream[:, :, None]).squeeze(-1) - share * total[:, None]) / temperature
    if logits.is_cuda:
        if len(logits):
            _, gradient = _kernels()
            scale, width = (total / temperature).contiguous(), logits.shape[1]
            where = (logits.stride(0), vocab_size, width, 1 / temperature)
            gradient[(len(logits),)](logits, lse, scale, *where, **GRADIENT)
    else:
        shares = (_wide(logits[:, :vocab_size]) / temperature - lse[:, None]).exp_()
        logits[:, :vocab_size] = shares.mul_(-total[:, None] / temperature)
        logits[:, vocab_size:] = 0
    logits.scatter_(1, targets, at_targets.to(logits.dtype))


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


@lru_cache(maxsize=1)
def _kernels() -> tuple[Any, Any]:
    """The two Triton kernels; made when first needed, as a CPU has no Triton."""
    from posttrain.model.softmax_kernels import gradient, stats

    return stats, gradient
