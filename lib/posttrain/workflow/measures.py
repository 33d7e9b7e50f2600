"""The numbers of a final evaluation: what people call them, which way is better, and the gate that reads them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from posttrain.errors import ConfigError, GateError

LABELS = {
    "loss": "loss, nats per token or pair",
    "perplexity": "perplexity",
    "divergence": "divergence from the teacher",
    "accuracy": "accuracy against the labels",
    "abs_error": "distance from the ratings",
    "calibration_error": "expected calibration error",
    "prefers_chosen": "chosen answer likelier",
    "margin": "margin of the chosen",
    "preference": "log p of the chosen answer over the rejected, nats",
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
    samples = name.removeprefix(PASS)
    return LABELS.get(name) or ("solved by 1 sample" if samples == "1" else f"solved by one of {samples} samples")


def pass_names(samples: int) -> list[str]:
    """The pass@k of an evaluation that draws `samples`: k = 1, 2, 4, ... and `samples`."""
    return [f"{PASS}{k}" for k in sorted({samples, *(2**i for i in range(samples.bit_length()) if 2**i <= samples)})]


def perplexity(loss: float) -> float:
    """exp of nats per token; of a loss no float can hold, infinity."""
    return math.exp(loss) if loss < 700 else math.inf


def gated(name: str, slice_by: str | None) -> tuple[str, str | None]:
    """What a key of the gate names: a measure, and the slice that it is of, None of all held-out rows.

    With slice_by lang: "loss[lang=de]" -> loss, de; "loss" -> loss, None. A key that is written in another way is taken
    for a measure whole, and there is none of that name.
    """
    measure, _, inside = name.partition("[")
    if slice_by is None or not inside.startswith(f"{slice_by}=") or not inside.endswith("]"):
        return name, None
    return measure, inside[len(slice_by) + 1 : -1]


def check_slices(gate: Iterable[str], slice_by: str | None, slices: Iterable[str]) -> None:
    """Refuse a gate on a slice that is none of those of the held-out rows.

    Raises:
        ConfigError: names every such key, and the slices that there are.
    """
    there = sorted(set(slices))
    parts = {name: gated(name, slice_by)[1] for name in gate}
    if problems := [
        f"eval.gate.{name}: no row of data.held_out that is evaluated has {slice_by} = {part}; there are "
        f"{', '.join(there)}"
        for name, part in parts.items()
        if part is not None and part not in there
    ]:
        raise ConfigError("\n".join(problems))


def check_gate(
    evaluation: Mapping[str, Mapping[str, Any]],
    gate: Mapping[str, float],
    *,
    before: str,
    after: str,
    slice_by: str | None = None,
) -> None:
    """Refuse a model that is worse than it was, on all held-out rows or on a slice of them.

    Args:
        gate: measure, or measure[column=value] -> by how much it may be worse.
        slice_by: the column of the slices.

    Raises:
        GateError: names every measure that is worse by more; one that is no number is. So is one that was not measured,
            as where every row of a slice failed.
    """
    problems = []
    for name, allowed in gate.items():
        measure, part = gated(name, slice_by)
        lacking = [model for model in (before, after) if measure not in _part(evaluation[model], part)]
        if lacking:
            problems.append(
                f"{name} was not measured of {lacking[0]}, which has {_there(evaluation[lacking[0]], part)}"
            )
            continue
        was, now = (_part(evaluation[model], part)[measure] for model in (before, after))
        worse = (now - was) * (1 if measure in LOWER_IS_BETTER else -1)
        if not worse <= allowed:
            problems.append(f"{name} went from {was:g} to {now:g}, worse by {worse:g}; allowed {allowed:g}")
    if problems:
        raise GateError(f"eval.gate: {'; '.join(problems)}")


def _part(found: Mapping[str, Any], part: str | None) -> Mapping[str, Any]:
    """A model's measures on all rows, or on a slice; nothing where it has no such slice."""
    return found if part is None else found.get("slices", {}).get(part, {})


def _there(found: Mapping[str, Any], part: str | None) -> str:
    """The slices of a model where it has not the one that is asked for, else the measures."""
    slices = found.get("slices", {})
    if part is not None and part not in slices:
        return f"the slices {', '.join(slices) or 'of no column'}"
    return f"the measures {', '.join(in_order(_part(found, part)))}"
