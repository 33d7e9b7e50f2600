"""Which tokens may follow, the actions that an environment knows: a rule that samplers obey and trainers know.

`rollout.environment` names it: its class has the attribute `constraint`, the import path of a function.

A sampler that masks all but the allowed tokens draws from the policy's distribution, renormalised over them. That is
then the policy: the trainer's logprobs are renormalised over the same sets (model/allowed.py), or every importance
ratio and gradient would be of another distribution than the one that was sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from posttrain.errors import ConfigError, GenerationError
from posttrain.plugin import resolve

if TYPE_CHECKING:
    from torch import Tensor

KEY = "rollout.environment, its constraint"


class Constraint(Protocol):
    """A pure function of the tokens: sampler and trainer ask it apart, and must be told the same."""

    def allowed(self, prompt: Sequence[int], completion: Sequence[int]) -> Sequence[int] | None:
        """Ids that may come next, at least one, each once; None for any. Never asked after a stop token.

        Args:
            completion: what the policy has written of this turn; `prompt` is all before.
        """
        ...


def constraint_of(environment: str | None) -> str | None:
    """What load_constraint() takes: the attribute `constraint` of what rollout.environment names; None without one.

    Raises:
        ConfigError: there is no such environment.
    """
    return None if environment is None else getattr(resolve(environment, key="rollout.environment"), "constraint", None)


def load_constraint(path: str, folder: str | Path) -> Constraint:
    """Call `package.module:name` with the model's folder, which has the tokenizer and the files beside it.

    Raises:
        ConfigError: there is no such name, or what it makes allows nothing.
    """
    made = resolve(path, key=KEY)(Path(folder))
    if not callable(getattr(made, "allowed", None)):
        raise ConfigError(f"{KEY}: {path} made a {type(made).__name__} without `allowed(prompt, completion)`")
    return made


def next_tokens(constraint: Constraint, prompt: Sequence[int], completion: Sequence[int]) -> Sequence[int] | None:
    """Constraint.allowed(), checked.

    Raises:
        GenerationError: it allows nothing.
    """
    found = constraint.allowed(prompt, completion)
    if found is not None and not len(found):
        raise GenerationError(f"the constraint allows no token after the completion {list(completion)}")
    return found


def mask_logits(logits: Tensor, constraint: Constraint, prompt: Sequence[int], completion: Sequence[int]) -> None:
    """Leave in one row of logits [V] what the constraint allows next, all else at -inf, in place.

    Raises:
        GenerationError: it allows nothing.
    """
    found = next_tokens(constraint, prompt, completion)
    if found is not None:
        kept = logits[list(found)]
        logits.fill_(float("-inf"))
        logits[list(found)] = kept


def allowed_ids(
    constraint: Constraint, prompt: Sequence[int], completion: Sequence[int], mask: Sequence[float]
) -> np.ndarray:
    """[M, K] int32: what the sampler could choose from at each of the M tokens of `completion` that it wrote, filled
    up with -1; a row of -1 is any token.

    Args:
        mask: [C], 0 on tokens that an environment wrote: a turn of the policy begins after them.

    Raises:
        GenerationError: the sampler wrote what is not allowed: it does not obey the constraint.
    """
    sets: list[Sequence[int]] = []
    start = 0
    for place, (token, written) in enumerate(zip(completion, mask, strict=True)):
        if not written:
            start = place + 1
            continue
        found = next_tokens(constraint, (*prompt, *completion[:start]), completion[start:place])
        if found is not None and token not in found:
            raise GenerationError(
                f"the generator wrote token {token} after {list(completion[start:place])}, where the constraint "
                f"allows {list(found)[:8]}: it does not obey it, and nothing it wrote can be trained on"
            )
        sets.append(() if found is None else found)
    rows = np.full((len(sets), max(map(len, sets))), -1, np.int32)
    for row, found in zip(rows, sets, strict=True):
        row[: len(found)] = found
    return rows
