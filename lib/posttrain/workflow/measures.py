"""The numbers of a final evaluation: what people call them, which way is better, and the gate that reads them."""

import math
from collections.abc import Mapping
from typing import Any

from posttrain.errors import GateError

LABELS = {
    "loss": "loss, nats per token or pair",
    "perplexity": "perplexity",
    "divergence": "divergence from the teacher",
    "accuracy": "accuracy against the labels",
    "prefers_chosen": "chosen answer likelier",
    "margin": "margin of the chosen",
    "greedy_reward": "reward, greedy",
    "sampled_reward": "reward, sampled",
    "best_reward": "reward, best of k",
    "mean_tokens": "tokens per completion",
}
"""Key of a model's evaluation -> its name for people, in the order of tables."""

REWARDS = ("greedy_reward", "sampled_reward", "best_reward", "mean_tokens")
"""Measures of completions; the others are of rows."""

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "divergence"})
NOT_JUDGED = frozenset({"mean_tokens", "margin"})
"""Measures of which neither way is better."""


def measured(evaluation: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Keys that every model of an evaluation has, in the order of LABELS."""
    return [name for name in LABELS if all(name in found for found in evaluation.values())]


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
