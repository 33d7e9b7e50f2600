"""One model's measures on held-out rows: of all, of every slice, by margin, by attribute, and by how sure it is."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from posttrain.data.pack import pack
from posttrain.data.types import Unit
from posttrain.model.losses import Loss, count
from posttrain.workflow.calibration import calibration_error, reliability
from posttrain.workflow.measures import perplexity
from posttrain.workflow.policy import Policy
from posttrain.workflow.reference import FIELD, score

Measures = Sequence[tuple[Loss, Mapping[str, str]]]
"""Losses to evaluate, each with its metrics -> names of measures."""

MOST_MARGINS = 6
"""Different margins that are told apart; of more, each quarter of the pairs."""


async def measure_rows(
    policy: Policy, units: Sequence[Unit], measures: Measures, *, slices: Sequence[str] = ()
) -> dict[str, Any]:
    """The measures of all units and, below `slices` and `margins`, of some of them.

    Args:
        slices: the slice of every unit, or none.

    Returns:
        rows and measures; of ratings `attributes`, of preferences and labels `reliability`.
    """
    found = await _measured(policy, units, measures)
    for group, names in (("slices", slices), ("margins", margins_of(units))):
        parts: dict[str, list[Unit]] = {}
        for name, unit in zip(names, units, strict=True) if names else ():
            parts.setdefault(name, []).append(unit)
        told = {name: await _measured(policy, parts[name], measures) for name in sorted(parts)}
        found |= {group: {name: _flat(each) for name, each in told.items()}} if told else {}
    return found


async def row_scores(policy: Policy, units: Sequence[Unit]) -> dict[str, float]:
    """Number of each unit -> what is better the more it is, nats.

    Of a row mean log p of its trained tokens: minus its own loss. Of a pair log p(chosen) - log p(rejected), whose gain
    over another model is the implicit reward margin of DPO with that model as reference, without beta (Rafailov et al.
    2023, eq. 7).
    """
    found = {}
    for number, unit in enumerate(await score(policy, units)):
        sums = [sample.fields[FIELD] for sample in unit]
        if len(unit) == 2:
            found[str(number)] = sums[0] - sums[1]
        else:
            (sample,) = unit
            found[str(number)] = sums[0] / float(sample.loss_mask.sum())
    return found


def margins_of(units: Sequence[Unit]) -> list[str]:
    """By how much the chosen answer of every pair was meant to win, or between what; none where all are the same."""
    margins = [unit[0].fields.get("margin", 0.0) for unit in units]
    values = sorted(set(margins))
    if len(values) < 2:
        return []
    if len(values) <= MOST_MARGINS:
        return [f"{margin:g}" for margin in margins]
    ordered = sorted(margins)
    edges = sorted({ordered[round(quarter * (len(ordered) - 1) / 4)] for quarter in range(5)})
    spans = list(pairwise(edges))
    number = [next(i for i, (_, high) in enumerate(spans) if margin <= high) for margin in margins]
    return [f"{i + 1}: {spans[i][0]:g} to {spans[i][1]:g}" for i in number]


async def _measured(policy: Policy, units: Sequence[Unit], measures: Measures) -> dict[str, Any]:
    packs = pack(units, pack_tokens=policy.pack_tokens)
    found: dict[str, Any] = {"rows": len(units)}
    for loss, names in measures:
        metrics = await policy.evaluate(packs, loss)
        found |= {name: round(metrics[metric], 4) for metric, name in names.items()}
        if loss.reads == "tokens":
            found["perplexity"] = round(perplexity(metrics["loss"]), 4)
        if "bin_0/count" in metrics:
            found["calibration_error"] = round(calibration_error(metrics), 4)
            found["reliability"] = reliability(metrics, count(loss, packs))
        rated = [name.removesuffix("/abs_error") for name in metrics if name.endswith("/abs_error")]
        if rated:
            found |= _ratings(metrics, rated, len(units))
    return found


def _ratings(metrics: Mapping[str, float], names: Sequence[str], rows: int) -> dict[str, Any]:
    """Mean distance from the ratings that there are, of all attributes together and of each."""
    known = {name: metrics[f"{name}/labelled"] for name in names}
    error = {name: metrics[f"{name}/abs_error"] for name in names}
    told = {
        name: {"rows": round(known[name] * rows), "abs_error": round(error[name] / known[name], 4)}
        for name in names
        if known[name]
    }
    return {"abs_error": round(sum(error.values()) / sum(known.values()), 4), "attributes": told}


def _flat(found: Mapping[str, Any]) -> dict[str, Any]:
    """Only numbers: what a slice is told by."""
    return {name: value for name, value in found.items() if isinstance(value, int | float)}
