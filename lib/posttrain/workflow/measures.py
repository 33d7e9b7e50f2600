"""The numbers of a final evaluation: what people call them, which way is better, and the gate that reads them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from posttrain.errors import GateError

LABELS = {
    "loss": "loss, nats per token or pair",
    "perplexity": "perplexity",
    "divergence": "divergence from the teacher",
    "accuracy": "accuracy against the labels",
    "abs_error": "distance from the ratings",
    "calibration_error": "expected calibration error",
    "prefers_chosen": "chosen answer likelier",
    "margin": "margin of the chosen",
    "greedy_reward": "reward, greedy",
    "sampled_reward": "reward, sampled",
    "best_reward": "reward, best of k",
    "mean_tokens": "tokens per completion",
}
"""Key of a model's evaluation -> its name for people, in the order of tables; pass@k comes before the tokens."""

PASS = "pass@"
"""pass@4: the share of prompts that at least one of 4 samples solves."""

REWARDS = ("greedy_reward", "sampled_reward", "best_reward", "mean_tokens")
"""Measures of completions; the others are of rows."""

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "divergence", "abs_error", "calibration_error"})
NOT_JUDGED = frozenset({"mean_tokens", "margin"})
"""Measures of which neither way is better."""


def measured(evaluation: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Keys of measures that every model of an evaluation has, in the order of LABELS."""
    first = next(iter(evaluation.values()), {})
    shared = [name for name in first if all(name in found for found in evaluation.values())]
    return in_order(shared)


def in_order(names: Iterable[str]) -> list[str]:
    """Those of the names that are measures, in the order of tables."""
    names = set(names)
    passes = sorted((name for name in names if name.startswith(PASS)), key=lambda name: int(name.removeprefix(PASS)))
    known = [name for name in LABELS if name in names]
    at = known.index("mean_tokens") if "mean_tokens" in known else len(known)
    return [*known[:at], *passes, *known[at:]]


def label_of(name: str) -> str:
    """What people call a measure."""
    return LABELS.get(name) or f"solved by one of {name.removeprefix(PASS)} samples"


def pass_names(samples: int) -> list[str]:
    """The pass@k of an evaluation that draws `samples`: k = 1, 2, 4, ... and `samples`."""
    return [f"{PASS}{k}" for k in sorted({samples, *(2**i for i in range(samples.bit_length()) if 2**i <= samples)})]


def perplexity(loss: float) -> float:
    """exp of nats per token; of a loss no float can hold, infinity."""
    return math.exp(loss) if loss < 700 else math.inf


def check_gate(
    evaluation: Mapping[str, Mapping[str, Any]], gate: Mapping[str, float], *, before: str, after: str
) -> None:
    """Refuse a model that is worse than it was.

    Args:
        gate: measure -> by how much it may be worse.

    Raises:
        GateError: names every measure that is worse by more; one that is no number is.
    """
    problems = []
    for name, allowed in gate.items():
        was, now = evaluation[before][name], evaluation[after][name]
        worse = (now - was) * (1 if name in LOWER_IS_BETTER else -1)
        if not worse <= allowed:
            problems.append(f"{name} went from {was:g} to {now:g}, worse by {worse:g}; allowed {allowed:g}")
    if problems:
        raise GateError(f"eval.gate: {'; '.join(problems)}")
