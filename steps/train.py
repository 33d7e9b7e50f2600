"""Token rows become a trained model, for the offline losses. Today: supervised fine-tuning, the warm-up of GRPO."""

import asyncio
from collections.abc import Sequence
from typing import Any

from posttrain import storage
from posttrain.compute.checkpoint import Checkpoints
from posttrain.compute.cluster import Gang, ray_cluster
from posttrain.config import RunConfig
from posttrain.data.tokens import read_samples
from posttrain.manifest import json_sha256
from posttrain.model.losses.sft import SFTLoss
from posttrain.workflow.loop import LoopPlan
from posttrain.workflow.loop import train as run_loop
from posttrain.workflow.observers import MetricsFile, Observer, Observers, Terminal
from posttrain.workflow.policy import Policy, Training
from steps.hardware import hardware


def train(
    config: RunConfig,
    *,
    root: str,
    model_uri: str,
    tokens_uri: str,
    observers: Sequence[Observer] = (),
) -> dict[str, Any]:
    """Warm up by supervised fine-tuning, or pass the model on when the config has no warm-up.

    Returns:
        model_uri of the result, and the loss at both ends.
    """
    if config.warmup is None:
        return {"model_uri": model_uri, "steps": 0}
    resources = hardware(config.parallel)
    with ray_cluster(Gang(), **resources.cluster):
        return asyncio.run(_train(config, root, model_uri, tokens_uri, list(observers), resources))


async def _train(config, root, model_uri, tokens_uri, observers, resources) -> dict[str, Any]:
    warmup = config.warmup
    samples = read_samples(storage.fetch(tokens_uri) / "demonstrations.parquet")
    steps = warmup.num_steps
    seen = Observers(
        [
            Terminal("warmup", steps, ["loss", "grad_norm"], every=max(1, steps // 10)),
            MetricsFile(storage.join(root, "metrics", "warmup.jsonl")),
            *observers,
        ]
    )
    training = Training(
        **config.optim.model_dump(exclude={"num_steps", "lr", "schedule", "warmup_steps"}),
        num_steps=steps,
        lr=warmup.lr,
        schedule="linear",
        warmup_steps=min(config.optim.warmup_steps, steps),
        pack_tokens=config.data.pack_tokens,
    )
    identity = {
        "config": json_sha256(config.model_dump(mode="json", include={"seed", "model", "data", "warmup", "optim"})),
        "tokens": json_sha256(storage.manifest_of(tokens_uri)["files"]),
    }
    checkpoints = Checkpoints(
        storage.join(root, "checkpoints", "warmup"), identity=identity, keep=config.checkpoint.keep
    )
    policy = await Policy.launch(
        ranks=resources.ranks_on_one_node,
        model_uri=model_uri,
        training=training,
        reference=False,
        timeout_s=config.rollout.timeout_s,
        hardware=resources.policy,
    )
    ledger = await run_loop(
        LoopPlan(
            num_steps=steps,
            samples_per_step=warmup.samples_per_step,
            pack_tokens=config.data.pack_tokens,
            seed=config.seed,
            checkpoint_every=config.checkpoint.every_steps,
            checkpoint_seconds=config.checkpoint.every_minutes * 60,
        ),
        policy=policy,
        samples=samples,
        loss=SFTLoss(),
        checkpoints=checkpoints,
        observers=seen,
    )
    return {
        "model_uri": await policy.export(storage.join(root, "warmup_model")),
        "steps": steps,
        "loss_first": round(seen.history[0]["loss"], 4),
        "loss_last": round(seen.history[-1]["loss"], 4),
        "ledger": ledger.state(),
    }


if __name__ == "__main__":
    from steps.program import main

    main(train)
