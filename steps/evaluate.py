"""Models become numbers on held-out rows: the trained one beside the one it started from."""

import asyncio
from typing import Any

from posttrain import storage
from posttrain.compute.cluster import Gang, ray_cluster
from posttrain.compute.weight_sync import digest
from posttrain.config import RunConfig
from posttrain.errors import SyncError
from posttrain.model.backend import backend_of
from posttrain.workflow.evaluate import Evaluator
from steps.hardware import hardware
from steps.sampling import RolloutParts, rollout_parts


def evaluate(config: RunConfig, *, tokens_uri: str, models: dict[str, str]) -> dict[str, Any]:
    """Evaluate every model in `models` (name -> uri) on the same prompts with the same sampling noise.

    All must share one architecture and tokenizer.

    Returns:
        name -> greedy, sampled and best-of-k reward, mean length, example rows.
    """
    resources = hardware(config.parallel)
    with ray_cluster(Gang(), **resources.cluster):
        return asyncio.run(_evaluate(config, tokens_uri, models, resources))


async def _evaluate(config, tokens_uri, models, resources) -> dict[str, Any]:
    first = next(iter(models.values()))
    parts = await rollout_parts(config, model_uri=first, tokens_uri=tokens_uri, resources=resources)
    evaluator = Evaluator(parts.maker, parts.held_out)
    results = {}
    for version, (name, uri) in enumerate(models.items()):
        await _send(parts, uri, version, backend=config.model.backend, timeout_s=config.rollout.timeout_s)
        results[name] = await evaluator.full(samples=config.eval.samples)
        print(f"{name}: greedy {results[name]['greedy_reward']}, sampled {results[name]['sampled_reward']}", flush=True)
    return results


async def _send(parts: RolloutParts, uri: str, version: int, *, backend: str, timeout_s: float) -> None:
    import torch

    chosen = backend_of(backend)
    model = chosen.load(storage.fetch(uri))
    dtype = getattr(torch, (await parts.generators.call("weight_dtype", timeout_s=timeout_s))[0])
    weights = {name: tensor.to(dtype) for name, tensor in chosen.tensors(model)}
    held = await parts.generators.call("sync", version, weights, timeout_s=timeout_s)
    if set(held) != {digest(weights.items())}:
        raise SyncError(f"a generator does not hold the weights of {uri}")


if __name__ == "__main__":
    from steps.program import main

    main(evaluate)
