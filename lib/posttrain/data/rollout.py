"""Prompts become sampling seeds; a scored group of rollouts becomes Units to train on."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from posttrain.data.constraint import Constraint, allowed_ids
from posttrain.data.sample import shift
from posttrain.data.types import Rollout, Unit


def request_seed(run_seed: int, uid: int, sample_index: int, attempt: int) -> int:
    """64 bits that depend on nothing else: a rollout's noise is the same on any engine, in any order, after any
    restart."""
    text = f"{run_seed}/{uid}/{sample_index}/{attempt}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def group_units(
    group: Sequence[Rollout],
    advantages: Sequence[float],
    *,
    by_sequence: bool = False,
    constraint: Constraint | None = None,
) -> list[Unit]:
    """One Unit per rollout: the completion carries loss, its advantage stands on every token of it.

    Args:
        by_sequence: every completion weighs 1 in all, as GRPO averages (arXiv:2402.03300, eq. 3), instead of every
            token, as DAPO does (arXiv:2503.14476, eq. 10).
        constraint: that the sampler obeyed; the units then say what it could choose from.

    Raises:
        GenerationError: it did not obey.
    """
    units = []
    for rollout, advantage in zip(group, advantages, strict=True):
        prompt, completion = rollout.prompt.token_ids, rollout.token_ids
        silent = [0.0] * len(prompt)
        mask = rollout.loss_mask or (1.0,) * len(completion)
        weight = 1.0 / sum(mask) if by_sequence else 1.0
        sample = shift(
            prompt + completion,
            silent + [weight * each for each in mask],
            sampler_logprobs=silent + list(rollout.logprobs),
            advantages=silent + [advantage * each for each in mask],
        )
        if constraint is not None:
            sample = replace(sample, allowed_ids=allowed_ids(constraint, prompt, completion, mask))
        units.append((sample,))
    return units
