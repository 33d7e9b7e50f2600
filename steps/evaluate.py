"""Models become numbers on held-out rows: the trained one beside the one it started from."""

import asyncio
from collections.abc import Callable
from typing import Any

from posttrain import storage
from posttrain.compute.cluster import Gang, ray_cluster
from posttrain.compute.weight_sync import digest
from posttrain.config import RunConfig
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.errors import GateError, SyncError
from posttrain.model.backend import backend_of
from posttrain.workflow.evaluate import Evaluator
from posttrain.workflow.lm_eval_tasks import run_lm_eval
from posttrain.workflow.measure_rows import measure_rows, row_scores
from posttrain.workflow.measures import check_gate, in_order
from posttrain.workflow.policy import Policy
from steps.export import write_model
from steps.hardware import Hardware, hardware
from steps.recipes import asked_set, build_of, has_passes, measures_of, training_of
from steps.sampling import RolloutParts, rollout_parts
from steps.streams import held_out_slices, held_out_units

OF_ROWS = ("loss", "preference")
"""What tells of rows of data.held_out and not of answers to eval.prompts."""


def evaluate(
    config: RunConfig,
    *,
    tokens_uri: str,
    models: dict[str, str],
    rows_uri: str | None = None,
    teacher_uri: str | None = None,
    per_row: str | None = None,
    show: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Evaluate every model in `models` (name -> uri) on the same rows, prompts and sampling noise.

    All must share one architecture and tokenizer. The gate compares the last with the first.

    Args:
        rows_uri: folder that an offline recipe trained on, with its held-out rows; that of `tokens_uri` when None.
        per_row: loss, preference, greedy_reward or sampled_reward, of every row or question in `scores`, more being
            better. The gate is then told, in `refused` of the last model, and not raised: the caller decides.
        show: called with the result, `refused` in it, before a gate is raised.

    Returns:
        name -> of an offline recipe its measures on data.held_out; where questions are asked, greedy, sampled and
        best-of-k reward, pass@k, mean length and example rows; with eval.slice_by both for every slice.

    Raises:
        DataError: a task of lm-eval could not be run.
        GateError: a measure of the last model is worse than eval.gate allows.
    """
    resources = hardware(config.parallel, gpus_each=config.rollout.tensor)
    with ray_cluster(Gang(), **resources.cluster):
        measured_with = (rows_uri or tokens_uri, teacher_uri)
        found = asyncio.run(_evaluate(config, tokens_uri, models, measured_with, resources, per_row))
    if config.eval.lm_eval:  # the actors are gone: a GPU of theirs is free
        for name, uri in models.items():
            found[name]["lm_eval"] = tasks_of_export(config, uri)
    names = {"before": next(iter(models)), "after": list(models)[-1]}
    refused = None
    try:
        check_gate(found, config.eval.gate, **names, slice_by=config.eval.slice_by)
    except GateError as error:
        refused = error
        found[names["after"]]["refused"] = str(error)
    if show:
        show(found)
    if refused is not None and per_row is None:
        raise refused
    return found


def tasks_of_export(config: RunConfig, uri: str) -> dict[str, dict[str, float]]:
    """eval.lm_eval of the folder that this model's export is, byte for byte but for the card and the lineage.

    Both models are put to the tasks in that form, so that neither differs by its generation_config.json or dtype.
    """
    with storage.staging(f"{uri}-exported") as folder:
        write_model(config, storage.fetch(uri), folder)
        return run_lm_eval(str(folder), config.eval.lm_eval)


async def _evaluate(config, tokens_uri, models, measured_with, resources, per_row) -> dict[str, dict[str, Any]]:
    rows_uri, teacher_uri = measured_with
    results: dict[str, dict[str, Any]] = {name: {} for name in models}
    if config.method.name != "grpo":
        for name, uri in models.items():
            results[name] |= await _measure(config, uri, rows_uri, teacher_uri, resources, per_row)
            shown = ", ".join(f"{key} {results[name][key]:.4f}" for key in in_order(results[name]))
            print(f"{name}: {shown}", flush=True)
    if not config.samples_completions:
        return results
    first = next(iter(models.values()))
    what = {"model_uri": first, "tokens_uri": tokens_uri, "tokenizer": BaseHFModelTokenizer(storage.fetch(first))}
    parts = await rollout_parts(config, **what, resources=resources)
    slice_by = config.eval.slice_by if config.method.name == "grpo" else None  # a column of data.held_out
    evaluator = Evaluator(parts.maker, parts.sets[asked_set(config)])
    told = {"slice_by": slice_by, "per_row": None if per_row in OF_ROWS else per_row}
    for version, (name, uri) in enumerate(models.items()):
        await _send(parts, uri, version, backend=config.model.backend)
        asked = await evaluator.full(samples=config.eval.samples, passes=has_passes(config), **told)
        results[name] |= asked
        print(f"{name}: greedy {results[name]['greedy_reward']}, sampled {results[name]['sampled_reward']}", flush=True)
    return results


async def _measure(
    config: RunConfig, uri: str, rows_uri: str, teacher_uri: str | None, resources: Hardware, per_row: str | None
) -> dict[str, Any]:
    """The recipe's own measures of one model on data.held_out."""
    policy = await Policy.launch(
        sizes=resources.sizes_on_one_node,
        model_uri=uri,
        backend=config.model.backend,
        training=training_of(config, config.method.name),
        reference=False,
        timeout_s=config.rollout.timeout_s,
        pool=resources.policy,
        build=build_of(config, teacher_uri, trains=False),
    )
    slices = held_out_slices(config, rows_uri)
    units = held_out_units(rows_uri)
    found = await measure_rows(policy, units, measures_of(config), slices=slices)
    if per_row in OF_ROWS:
        found["scores"] = await row_scores(policy, units)
    policy.group.kill()
    return found


async def _send(parts: RolloutParts, uri: str, version: int, *, backend: str) -> None:
    import torch

    chosen = backend_of(backend)
    model = chosen.load(storage.fetch(uri))
    dtype = getattr(torch, await parts.generators.weight_dtype())
    weights = {name: tensor.to(dtype) for name, tensor in chosen.tensors(model)}
    held = await parts.generators.sync(version, lambda _: weights)
    if set(held.values()) != {digest(weights.items())}:
        raise SyncError(f"a generator does not hold the weights of {uri}")


if __name__ == "__main__":
    from steps.program import main

    main(evaluate)
