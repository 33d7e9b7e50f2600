"""A model, prompts and a reward become a better model: brings up the actors and runs the controller."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from posttrain import storage
from posttrain.compute.cluster import Gang, ray_cluster
from posttrain.config import RunConfig
from posttrain.config_method import GRPO
from posttrain.data.advantage import advantages_of
from posttrain.data.constraint import constraint_of, load_constraint
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.model.losses import Loss
from posttrain.model.losses.policy_gradient import (
    ClippedLoss,
    SequenceLoss,
    SequenceTruncatedLoss,
    TruncatedLoss,
    UncorrectedLoss,
)
from posttrain.model.losses.value import ValueLoss
from posttrain.workflow.controller import Controller, Plan
from posttrain.workflow.credit import Credit
from posttrain.workflow.evaluate import Evaluator
from posttrain.workflow.ledger_file import LedgerFile
from posttrain.workflow.observers import MetricsFile, Observer, Observers, Terminal
from posttrain.workflow.policy import Policy
from posttrain.workflow.rollout_file import RolloutFile, folder_of
from posttrain.workflow.stopping import StopSignal
from posttrain.workflow.training import Training
from steps.hardware import hardware
from steps.recipes import build_of
from steps.sampling import adapters_apart, rollout_parts, weights_way
from steps.saving import checkpoints_of, saver_of
from steps.tracking import tracking

SHOWN = ["reward/mean", "eval/reward", "policy/kl", "policy/teacher_kl", "policy/entropy", "rollout/tokens_mean"]


def grpo(
    config: RunConfig,
    *,
    root: str,
    model_uri: str,
    tokens_uri: str,
    teacher_uri: str | None = None,
    gang: Gang | None = None,
    observers: Sequence[Observer] = (),
) -> dict[str, Any] | None:
    """Train, and export the last weights.

    Returns:
        model_uri, checkpoint root, rewards at both ends and the ledger; None on a node
        that only lent its hardware.
    """
    resources = hardware(config.parallel, config.rollout.generators, gpus_each=config.rollout.tensor)
    with ray_cluster(gang or Gang(), **resources.cluster) as driving:
        if not driving:
            return None
        uris = {"root": root, "model_uri": model_uri, "tokens_uri": tokens_uri}
        shaped_by = {"warmup", "method", "rollout", "reward"}
        kept = checkpoints_of(config, stage="grpo", shaped_by=shaped_by, teacher_uri=teacher_uri, **uris)
        with StopSignal() as stop, kept.writing(), tracking(config, root=root, phase="grpo") as trackers:
            saving = partial(saver_of, config, checkpoints=kept, num_steps=config.optim.num_steps, stop=stop)
            build = build_of(config, teacher_uri)
            return asyncio.run(_grpo(config, uris, [*observers, *trackers], resources, saving, build))


async def _grpo(config, uris, observers, resources, saving, build) -> dict[str, Any]:
    method, optim, (root, model_uri, tokens_uri) = config.method, config.optim, uris.values()
    assert isinstance(method, GRPO), "the flow has refused any other"
    reading = asyncio.create_task(asyncio.to_thread(BaseHFModelTokenizer, storage.fetch(model_uri)))  # as ranks start
    policy = await Policy.launch(
        sizes=resources.sizes,
        model_uri=model_uri,
        backend=config.model.backend,
        training=Training(**optim.model_dump(), pack_tokens=config.data.pack_tokens),
        reference=method.kl_coef is not None,
        timeout_s=config.rollout.timeout_s,
        pool=resources.policy,
        build=build,
    )
    # After the policy, so that a generator finds the GPU of a rank that it is to share, and not one of another.
    what = {"model_uri": model_uri, "tokens_uri": tokens_uri, "tokenizer": await reading}
    adapters = adapters_apart(config, build.lora)
    facts = {"resources": resources, "count": config.rollout.generators, "adapters": adapters}
    parts = await rollout_parts(config, **what, **facts)
    rule = constraint_of(config.rollout.environment)
    metrics_uri = storage.join(root, "metrics", "grpo.jsonl")
    kept = RolloutFile(folder_of(root))
    seen = Observers([Terminal("grpo", optim.num_steps, SHOWN), MetricsFile(metrics_uri), kept, *observers])
    controller = Controller(
        Plan(
            num_steps=optim.num_steps,
            prompts_per_step=config.rollout.prompts_per_step,
            group_size=method.group_size,
            max_staleness=config.rollout.max_staleness,
            advantages=advantages_of(method.advantage),
            weigh_by_sequence=method.weigh == "sequence",
            pack_tokens=config.data.pack_tokens,
            eval_every=config.eval.every_steps,
            constraint=None if rule is None else load_constraint(rule, storage.fetch(model_uri)),
            credit=_credit(method, temperature=config.rollout.temperature),
            passes=method.epochs,
            sync=weights_way(config, resources),
            adapters=adapters is not None,
            sleep=config.rollout.sleep,
        ),
        policy=policy,
        maker=parts.maker,
        evaluator=Evaluator(parts.maker, parts.sets["held_out"]),
        loss=_loss(method, temperature=config.rollout.temperature),
        saver=saving(policy),
        ledger_file=LedgerFile(storage.join(root, "ledger", "grpo.jsonl")),
        observers=seen,
    )
    await controller.run(parts.sets["prompts"])
    return {
        "model_uri": await policy.export(storage.join(root, "trained_model")),
        "checkpoints": controller.saver.checkpoints.uri,
        "metrics": metrics_uri,
        "rollouts": kept.uri,
        "steps": optim.num_steps,
        "reward_first": round(seen.history[0]["reward/mean"], 4),
        "reward_last": round(seen.history[-1]["reward/mean"], 4),
        "ledger": controller.ledger.state(),
    }


def _credit(method: GRPO, *, temperature: float) -> Credit | None:
    """What gives every token an advantage of its own; None where it is its completion's."""
    paid = (method.kl_coef or 0.0) if method.kl_in == "reward" else 0.0
    if not paid and method.advantage not in ("gae", "teacher"):
        return None
    return Credit(
        temperature=temperature,
        kl_coef=paid,
        kl_estimator=method.kl_estimator,
        teacher=method.advantage == "teacher",
        gae=method.gae if method.advantage == "gae" else None,
    )


def _loss(method: GRPO, *, temperature: float) -> Loss:
    policy = _policy_loss(method, temperature=temperature)
    if method.advantage != "gae":
        return policy
    # One range for ratios and values, as PPO's own implementation has it.
    return ValueLoss(policy=policy) if method.clip is None else ValueLoss(policy=policy, clip=method.clip[1])


def _policy_loss(method: GRPO, *, temperature: float) -> Loss:
    shared: dict[str, Any] = {
        "temperature": temperature,
        "kl_coef": (method.kl_coef or 0.0) if method.kl_in == "loss" else 0.0,
        "kl_estimator": method.kl_estimator,
    }
    if method.clip is not None:
        shared |= {"low": method.clip[0], "high": method.clip[1]}
    match method.loss:
        case "truncated":
            return TruncatedLoss(importance_cap=method.importance_cap, **shared)
        case "truncated_sequence":
            return SequenceTruncatedLoss(importance_cap=method.importance_cap, **shared)
        case "clipped":
            return ClippedLoss(**shared)
        case "sequence":
            return SequenceLoss(**shared)
        case "uncorrected":
            return UncorrectedLoss(**shared)


if __name__ == "__main__":
    from steps.program import main

    main(grpo)
