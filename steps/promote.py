"""A trained model replaces the champion, or does not: the gate, the comparison row by row, and the registry."""

import json
from typing import Any

from posttrain import storage
from posttrain.config_retrain import RetrainConfig
from posttrain.workflow import registry
from posttrain.workflow.compare import Comparison, compare
from posttrain.workflow.measures import measured
from steps.origin import LINEAGE


def promote(
    config: RetrainConfig,
    *,
    found: dict[str, Any],
    evaluation: dict[str, dict[str, Any]],
    exported_uri: str,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Promote the model if it is better than what it was trained from by the config's margin, with its confidence.

    Called again by a retry it finds what the run has done already.

    Args:
        found: what look() returned when the run began.
        evaluation: of "before" and "after", with `scores` of every row.

    Returns:
        outcome: promoted; kept where it is not better or the gate refuses it; stale where another run came first. why,
        for people; version, None where it has none; champion, now; run, parent, measure, files; comparison.

    Raises:
        DataError: too few rows were scored for both models.
        CheckpointError: the registry is damaged, or the copy of the model is.
    """
    before, after = evaluation["before"], evaluation["after"]
    rule = {"margin": config.retrain.margin, "confidence": config.retrain.confidence, "seed": config.seed}
    comparison = compare(before["scores"], after["scores"], **rule)
    run, parent, where = f"{provenance['flow']}/{provenance['run_id']}", found["parent"], found["registry"]
    told = {
        "run": run,
        "parent": parent,
        "measure": config.retrain.measure,
        "files": len(found["files"]),
        "comparison": comparison.plain(),
    }
    if "refused" in after or not comparison.better:
        kept = {"outcome": "kept", "why": after.get("refused") or _not_enough(comparison), "version": None, **told}
        registry.note_judged(where, found["key"], kept)
        return kept | {"champion": parent}
    seen = {} if parent is None else registry.version(where, parent)["data"]
    facts = {
        "data": {**seen, **found["files"]},
        "new_files": found["files"],
        "measures": {name: [before[name], after[name]] for name in measured(evaluation)},
        "comparison": {"measure": config.retrain.measure, **comparison.plain()},
        "config_sha256": provenance["config_sha256"],
        "lineage": json.loads(storage.read_bytes(storage.join(exported_uri, LINEAGE))),
    }
    candidate = registry.Candidate(run=run, parent=parent, model_uri=exported_uri, key=found["key"], facts=facts)
    done = registry.promote(where, candidate)
    return {**told, **done, "why": _why(done, comparison, parent)}


def _not_enough(found: Comparison) -> str:
    return f"{_sure(found)}; it must be above {found.margin:g}"


def _sure(found: Comparison) -> str:
    return f"the gain of {found.gain:+.4g} is above {found.low:.4g} with {found.confidence:.0%} confidence"


def _why(done: dict[str, Any], found: Comparison, parent: int | None) -> str:
    if done["outcome"] == "stale":
        was = "there was no champion" if parent is None else f"version {parent} was champion"
        return f"{was} when this run began, and version {done['champion']} is now; nothing was changed"
    return f"{_sure(found)}, and so above the margin, {found.margin:g}"
