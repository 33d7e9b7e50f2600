"""A stream of packs trains a model: the recipes on rows, and the supervised warm-up before any recipe."""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from posttrain import storage
from posttrain.compute.checkpoint import Checkpoints
from posttrain.compute.cluster import Gang, ray_cluster
from posttrain.compute.data_workers import window_workers
from posttrain.config import Distill, RunConfig
from posttrain.data.loader import loading
from posttrain.data.pack import pack
from posttrain.data.types import Pack
from posttrain.workflow.held_out import HeldOut
from posttrain.workflow.ledger_file import LedgerFile
from posttrain.workflow.loop import LoopPlan
from posttrain.workflow.loop import train as run_loop
from posttrain.workflow.observers import MetricsFile, Observer, Observers, Terminal
from posttrain.workflow.policy import Policy
from posttrain.workflow.stopping import StopSignal
from posttrain.workflow.training import Training
from steps.annotate import annotate, needs_reference
from steps.hardware import Hardware, hardware
from steps.recipes import WARMUP, build_of, loss_of, packs_per_step, training_of
from steps.saving import checkpoints_of, saver_of
from steps.streams import held_out_units, open_stream
from steps.tracking import tracking

SHOWN = ["loss", "accuracy", "margin", "eval/loss", "eval/accuracy", "grad_norm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the steps before left, for one stage of training."""

    root: str
    model_uri: str
    tokens_uri: str
    teacher_uri: str | None
    stage: str


def train(
    config: RunConfig,
    *,
    root: str,
    model_uri: str,
    tokens_uri: str,
    teacher_uri: str | None = None,
    recipe: bool = False,
    gang: Gang | None = None,
    observers: Sequence[Observer] = (),
) -> dict[str, Any] | None:
    """Train the recipe, or warm up for it; passes the model on when the config has no warm-up.

    Args:
        teacher_uri: of a distillation; one drawn at random is what the warm-up trains.
        recipe: the recipe itself, in place of its warm-up.

    Returns:
        model_uri and teacher_uri for what comes next, tokens_uri that was trained on, and the loss at both ends; None
        on a node that only lent its hardware.
    """
    stage = config.method.name if recipe else WARMUP
    inputs = Inputs(root=root, model_uri=model_uri, tokens_uri=tokens_uri, teacher_uri=teacher_uri, stage=stage)
    if not recipe and config.warmup is None:
        return {"model_uri": model_uri, "teacher_uri": teacher_uri, "steps": 0}
    resources = hardware(config.parallel)
    with ray_cluster(gang or Gang(), **resources.cluster) as driving:
        if not driving:
            return None
        with tracking(config, root=root, phase=stage) as trackers:
            return _stage(config, inputs, [*observers, *trackers], resources)


def _stage(config: RunConfig, inputs: Inputs, observers: list[Observer], resources: Hardware) -> dict[str, Any]:
    """Train, and say whose weights the result is: in the warm-up of a distillation it may be the teacher's."""
    method, teacher_uri = config.method, inputs.teacher_uri
    makes_teacher = inputs.stage == WARMUP and isinstance(method, Distill) and method.teacher.fresh is not None
    if not makes_teacher or teacher_uri is None:
        return asyncio.run(_train(config, inputs, observers, resources))
    found = asyncio.run(_train(config, replace(inputs, model_uri=teacher_uri, teacher_uri=None), observers, resources))
    return found | {"model_uri": inputs.model_uri, "teacher_uri": found["model_uri"]}


async def _train(config: RunConfig, inputs: Inputs, observers: list[Observer], resources: Hardware) -> dict[str, Any]:
    stage, training = inputs.stage, training_of(config, inputs.stage)
    steps, recipe = training.num_steps, inputs.stage != WARMUP
    metrics_uri = storage.join(inputs.root, "metrics", f"{stage}.jsonl")
    terminal = Terminal(stage, steps, SHOWN, every=max(1, steps // 10))
    seen = Observers([terminal, MetricsFile(metrics_uri), *observers])
    ledger_uri = storage.join(inputs.root, "ledger", f"{stage}.jsonl")
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        kept = stack.enter_context(_checkpoints(config, inputs).writing())
        policy = await _launch(config, inputs, training, resources)
        tokens_uri, held_out = inputs.tokens_uri, None
        if recipe and needs_reference(config):
            tokens_uri = await annotate(config, policy, root=inputs.root, tokens_uri=tokens_uri)
        if recipe:
            best = storage.join(inputs.root, "best_models") if config.eval.deliver == "best" else None
            packs = held_out_packs(config, tokens_uri)
            held_out = HeldOut(packs, every_steps=config.eval.every_steps, num_steps=steps, best_uri=best)
        ledger = await run_loop(
            LoopPlan(
                num_steps=steps,
                packs_per_step=packs_per_step(config, stage),
                pack_tokens=config.data.pack_tokens,
            ),
            policy=policy,
            load=_loading(config, stack, inputs, tokens_uri, workers=resources.data_workers),
            loss=loss_of(config, stage),
            saver=saver_of(config, policy, kept, num_steps=steps, stop=stop),
            ledger_file=stack.enter_context(closing(LedgerFile(ledger_uri))),
            observers=seen,
            held_out=held_out,
        )
    last = await policy.export(storage.join(inputs.root, "trained_model" if recipe else "warmup_model"))
    best_uri = held_out.best(seen.history)[0] if held_out else None
    return {
        "model_uri": best_uri or last,
        "teacher_uri": inputs.teacher_uri,
        "tokens_uri": tokens_uri,
        "steps": steps,
        "loss_first": round(seen.history[0]["loss"], 4),
        "loss_last": round(seen.history[-1]["loss"], 4),
        "metrics": metrics_uri,
        "ledger": ledger.state(),
    }


def _checkpoints(config: RunConfig, inputs: Inputs) -> Checkpoints:
    """Checkpoints of this stage."""
    return checkpoints_of(
        config,
        root=inputs.root,
        stage=inputs.stage,
        shaped_by={"warmup"} if inputs.stage == WARMUP else {"warmup", "method"},
        model_uri=inputs.model_uri,
        tokens_uri=inputs.tokens_uri,
        teacher_uri=inputs.teacher_uri,
    )


def held_out_packs(config: RunConfig, tokens_uri: str) -> list[Pack]:
    """What an offline recipe is evaluated on."""
    return pack(held_out_units(tokens_uri), pack_tokens=config.data.pack_tokens)


async def _launch(config: RunConfig, inputs: Inputs, training: Training, resources: Hardware) -> Policy:
    recipe = inputs.stage != WARMUP
    return await Policy.launch(
        sizes=resources.sizes if recipe else resources.sizes_on_one_node,
        model_uri=inputs.model_uri,
        backend=config.model.backend,
        training=training,
        # Rows that are tokenised while training have no column to hold what a reference said of them.
        reference=recipe and needs_reference(config) and config.data.tokenize == "online",
        timeout_s=config.rollout.timeout_s,
        pool=resources.policy,
        build=build_of(config, inputs.teacher_uri) if recipe else None,
    )


def _loading(config: RunConfig, stack: ExitStack, inputs: Inputs, tokens_uri: str, *, workers: int):
    """A loader's state -> the loader; its windows are made by CPU actors where there are any, else by a thread."""
    make = partial(open_stream, config, tokens_uri=tokens_uri, model_uri=inputs.model_uri, stage=inputs.stage)
    timeout_s = config.rollout.timeout_s
    works = stack.enter_context(window_workers(make, count=workers, timeout_s=timeout_s)) if workers else []
    budget = config.data.max_bad_rows
    return lambda state: loading(make(), workers=works, max_bad_rows=budget, state=state, timeout_s=timeout_s)


if __name__ == "__main__":
    from steps.program import main

    main(train)
