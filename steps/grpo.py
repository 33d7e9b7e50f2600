"""A model, prompts and a reward become a better model: brings up the actors and runs the controller."""

import asyncio
from collections.abc import Sequence
from typing import Any

from posttrain import storage
from posttrain.compute.checkpoint import Checkpoints
from posttrain.compute.cluster import Gang, ray_cluster
from posttrain.config import RunConfig
from posttrain.manifest import json_sha256
from posttrain.model.losses.grpo import GRPOLoss
from posttrain.workflow.controller import Controller, Plan
from posttrain.workflow.evaluate import Evaluator
from posttrain.workflow.ledger_file import LedgerFile
from posttrain.workflow.observers import MetricsFile, Observer, Observers, Terminal
from posttrain.workflow.policy import Policy, Training
from steps.hardware import hardware
from steps.sampling import rollout_parts

SHOWN = ["reward/mean", "eval/reward", "policy/kl", "policy/entropy", "rollout/tokens_mean"]


def grpo(
    config: RunConfig,
    *,
    root: str,
    model_uri: str,
    tokens_uri: str,
    gang: Gang | None = None,
    observers: Sequence[Observer] = (),
) -> dict[str, Any] | None:
    """Train, and export the last weights.

    Returns:
        model_uri, checkpoint root, rewards at both ends and the ledger; None on a node
        that only lent its hardware.
    """
    resources = hardware(config.parallel)
    with ray_cluster(gang or Gang(), **resources.cluster) as driving:
        if not driving:
            return None
        return asyncio.run(_grpo(config, root, model_uri, tokens_uri, list(observers), resources))


async def _grpo(config, root, model_uri, tokens_uri, observers, resources) -> dict[str, Any]:
    method, optim = config.method, config.optim
    parts = await rollout_parts(config, model_uri=model_uri, tokens_uri=tokens_uri, resources=resources)
    policy = await Policy.launch(
        sizes=resources.sizes,
        model_uri=model_uri,
        backend=config.model.backend,
        training=Training(**optim.model_dump(), pack_tokens=config.data.pack_tokens),
        reference=method.kl_coef is not None,
        timeout_s=config.rollout.timeout_s,
        hardware=resources.policy,
    )
    metrics_uri = storage.join(root, "metrics", "grpo.jsonl")
    seen = Observers([Terminal("grpo", optim.num_steps, SHOWN), MetricsFile(metrics_uri), *observers])
    controller = Controller(
        Plan(
            num_steps=optim.num_steps,
            prompts_per_step=config.rollout.prompts_per_step,
            group_size=method.group_size,
            normalize_std=method.normalize_std,
            pack_tokens=config.data.pack_tokens,
            eval_every=config.eval.every_steps,
            checkpoint_every=config.checkpoint.every_steps,
            checkpoint_seconds=config.checkpoint.every_minutes * 60,
        ),
        policy=policy,
        maker=parts.maker,
        evaluator=Evaluator(parts.maker, parts.held_out),
        loss=GRPOLoss(
            temperature=config.rollout.temperature,
            importance_cap=method.importance_cap,
            kl_coef=method.kl_coef or 0.0,
        ),
        checkpoints=_checkpoints(config, root, model_uri, tokens_uri),
        ledger_file=LedgerFile(storage.join(root, "ledger", "grpo.jsonl")),
        observers=seen,
    )
    await controller.run(parts.prompts)
    return {
        "model_uri": await policy.export(storage.join(root, "trained_model")),
        "checkpoints": controller.checkpoints.uri,
        "metrics": metrics_uri,
        "steps": optim.num_steps,
        "reward_first": round(seen.history[0]["reward/mean"], 4),
        "reward_last": round(seen.history[-1]["reward/mean"], 4),
        "ledger": controller.ledger.state(),
    }


def _checkpoints(config: RunConfig, root: str, model_uri: str, tokens_uri: str) -> Checkpoints:
    """Checkpoints that only this config over these inputs may continue."""
    shaping = config.model_dump(
        mode="json", include={"seed", "model", "data", "warmup", "method", "optim", "rollout", "reward"}
    )
    identity = {
        "config": json_sha256(shaping),
        "model": json_sha256(storage.manifest_of(model_uri)["files"]),
        "tokens": json_sha256(storage.manifest_of(tokens_uri)["files"]),
    }
    return Checkpoints(storage.join(root, "checkpoints", "grpo"), identity=identity, keep=config.checkpoint.keep)


if __name__ == "__main__":
    from steps.program import main

    main(grpo)
