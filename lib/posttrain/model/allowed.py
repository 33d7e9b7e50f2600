"""Logprobs of a policy that may choose only among some tokens: those of the whole vocabulary, renormalised."""

import torch
from torch import Tensor


def renormalised(logprobs: Tensor, allowed_ids: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) - log sum_j p(allowed_j) [N], and the entropy [N] of that distribution, nats.

    It is softmax over the allowed logits alone: the vocabulary's normaliser cancels.

    Args:
        logprobs: [N, 1 + K] of the target, then of allowed_ids (of any token where that is -1), differentiable.
        allowed_ids: [N, K], -1 where there are fewer; a row of -1 alone is left as it is.
        entropy: [N] over the whole vocabulary.
    """
    none = allowed_ids < 0
    free = none.all(1)
    # A row without any would be log 0, whose gradient is NaN even where the result is not taken.
    among = logprobs[:, 1:].masked_fill(none, -torch.inf).masked_fill(free[:, None], 0.0)
    mass = among.logsumexp(1)
    inside = torch.special.entr((among.detach() - mass.detach()[:, None]).exp()).sum(1)
    return logprobs[:, 0] - torch.where(free, 0.0, mass), torch.where(free, entropy, inside)
