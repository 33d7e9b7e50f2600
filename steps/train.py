"""A stream of packs trains a model, for the offline losses. Today: supervised fine-tuning, the warm-up of GRPO."""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

from posttrain import storage
from posttrain.compute.checkpoint import Checkpoints
from posttrain.compute.cluster import Gang, ray_cluster
from posttrain.compute.data_workers import window_workers
from posttrain.config import RunConfig
from posttrain.data.loader import loading
from posttrain.manifest import json_sha256
from posttrain.model.losses.sft import SFTLoss
from posttrain.workflow.ledger_file import LedgerFile
from posttrain.workflow.loop import LoopPlan
from posttrain.workflow.loop import train as run_loop
from posttrain.workflow.observers import MetricsFile, Observer, Observers, Terminal
from posttrain.workflow.policy import Policy, Training
from steps.hardware import hardware
from steps.streams import open_stream


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
    policy = await Policy.launch(
        sizes=resources.sizes_on_one_node,
        model_uri=model_uri,
        backend=config.model.backend,
        training=training,
        reference=False,
        timeout_s=config.rollout.timeout_s,
        hardware=resources.policy,
    )
    with ExitStack() as stack:
        ledger = await run_loop(
            LoopPlan(
                num_steps=steps,
                packs_per_step=warmup.packs_per_step,
                pack_tokens=config.data.pack_tokens,
                checkpoint_every=config.checkpoint.every_steps,
                checkpoint_seconds=config.checkpoint.every_minutes * 60,
            ),
            policy=policy,
            load=_loading(config, stack, model_uri, tokens_uri, workers=resources.data_workers),
            loss=SFTLoss(),
            checkpoints=_checkpoints(config, root, model_uri, tokens_uri),
            ledger_file=stack.enter_context(closing(LedgerFile(storage.join(root, "ledger", "warmup.jsonl")))),
            observers=seen,
        )
    return {
        "model_uri": await policy.export(storage.join(root, "warmup_model")),
        "steps": steps,
        "loss_first": round(seen.history[0]["loss"], 4),
        "loss_last": round(seen.history[-1]["loss"], 4),
        "ledger": ledger.state(),
    }


def _loading(config, stack, model_uri, tokens_uri, *, workers):
    """A loader's state -> the loader; its windows are made by CPU actors where there are any, else by a thread."""
    make = partial(open_stream, config, tokens_uri=tokens_uri, model_uri=model_uri)
    timeout_s = config.rollout.timeout_s
    works = stack.enter_context(window_workers(make, count=workers, timeout_s=timeout_s)) if workers else []
    budget = config.data.max_bad_rows
    return lambda state: loading(make(), workers=works, max_bad_rows=budget, state=state, timeout_s=timeout_s)


def _checkpoints(config: RunConfig, root: str, model_uri: str, tokens_uri: str) -> Checkpoints:
    """Checkpoints that only this config over these inputs may continue."""
    shaping = config.model_dump(mode="json", include={"seed", "model", "data", "warmup", "optim"})
    identity = {
        "config": json_sha256(shaping),
        "model": json_sha256(storage.manifest_of(model_uri)["files"]),
        "tokens": json_sha256(storage.manifest_of(tokens_uri)["files"]),
    }
    return Checkpoints(storage.join(root, "checkpoints", "warmup"), identity=identity, keep=config.checkpoint.keep)


if __name__ == "__main__":
    from steps.program import main

    main(train)
