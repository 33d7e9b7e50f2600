"""A training step's checkpoints: where they are, what they belong to, and what saves them."""

import json
from collections.abc import Iterator
from typing import Any

from posttrain import storage
from posttrain.compute.checkpoint import Checkpoints
from posttrain.config import RunConfig
from posttrain.manifest import json_sha256
from posttrain.workflow.clock import SaveClock
from posttrain.workflow.policy import Policy
from posttrain.workflow.saving import Saver
from posttrain.workflow.stopping import StopSignal

ALWAYS = {"seed", "model", "data", "optim"}


def checkpoints_of(
    config: RunConfig,
    *,
    root: str,
    stage: str,
    shaped_by: set[str],
    model_uri: str,
    tokens_uri: str,
    teacher_uri: str | None = None,
) -> Checkpoints:
    """Checkpoints of one stage that only this config over these inputs may continue.

    Args:
        shaped_by: sections of the config, beside those that always do, that shape what is trained.
    """
    shaping = config.model_dump(mode="json", include=ALWAYS | shaped_by)
    tokens = storage.manifest_of(tokens_uri)
    identity = {
        **dict(_flat("config", shaping)),
        **dict(_flat("architecture", json.loads(storage.read_bytes(storage.join(model_uri, "config.json"))))),
        "tokenizer": tokens.get("tokenizer_sha256"),
        "model": json_sha256(storage.manifest_of(model_uri)["files"]),
        "tokens": json_sha256(tokens["files"]),
    }
    if teacher_uri is not None:
        identity["teacher"] = json_sha256(storage.manifest_of(teacher_uri)["files"])
    return Checkpoints(
        storage.join(root, "checkpoints", stage),
        identity=identity,
        keep=config.checkpoint.keep,
        made_from={"model_uri": model_uri, "backend": config.model.backend},
    )


def saver_of(config: RunConfig, policy: Policy, checkpoints: Checkpoints, *, num_steps: int, stop: StopSignal) -> Saver:
    """What saves `policy` as the config's `checkpoint` says."""
    when = config.checkpoint
    clock = SaveClock(num_steps=num_steps, every_steps=when.every_steps, every_seconds=when.every_minutes * 60)
    return Saver(policy, checkpoints, clock=clock, stop=stop)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings under dotted names, so that a difference can be told by its key."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(f"{name}.{key}", inner)
