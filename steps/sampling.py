"""What sampling and scoring need, from the config: shared by the training and the evaluation step."""

from dataclasses import dataclass, replace
from typing import Any

from posttrain import storage
from posttrain.compute.generator.transformers import TransformersGenerator
from posttrain.compute.generator.vllm import VllmGenerator
from posttrain.compute.workers import ActorGroup
from posttrain.config import RunConfig
from posttrain.config_method import GRPO
from posttrain.data.constraint import constraint_of
from posttrain.data.prompts import read_prompts
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.model.lora import ALL_LINEAR, LoRA
from posttrain.plugin import resolve
from posttrain.workflow.environments import Environments
from posttrain.workflow.generators import Generators
from posttrain.workflow.reward_pool import RewardPool
from posttrain.workflow.rollouts import Limit, Prompts, RolloutMaker, Sampling, Shaping
from posttrain.workflow.weight_push import Way
from steps.hardware import Hardware
from steps.origin import locate
from steps.recipes import prompt_sets

OWN_MEMORY, SHARED_MEMORY = 0.9, 0.4
"""Of a GPU's memory, for vLLM's weights and cache: alone, and of all engines beside a policy rank together."""

CALLS = 64
"""Groups that wait in one vLLM engine at once where it samples while the policy trains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutParts:
    """Generators, a reward process, and the sets of prompts by name."""

    generators: Generators
    maker: RolloutMaker
    sets: dict[str, Prompts]


async def rollout_parts(
    config: RunConfig,
    *,
    model_uri: str,
    tokens_uri: str,
    tokenizer: BaseHFModelTokenizer,
    resources: Hardware,
    count: int = 1,
    adapters: LoRA | None = None,
) -> RolloutParts:
    """Start `count` generators of `model_uri`'s architecture and a reward process, and read the prompts.

    Args:
        tokenizer: of `model_uri`.
        adapters: that generators get apart from the weights; see adapters_apart().
    """
    assert config.reward is not None, "the config's own check asks for a reward where completions are scored"
    arguments = {"model_uri": model_uri, "stop_ids": tokenizer.stop_ids, "pad_id": tokenizer.pad_id}
    if (rule := constraint_of(config.rollout.environment)) is not None:
        arguments |= {"constraint": rule}
    generators = Generators(
        _generators(config, arguments, resources, count, adapters),
        timeout_s=config.rollout.timeout_s,
        max_failures=config.rollout.max_failures,
    )
    judge = None if config.reward.model is None else locate(config.reward.model, config)
    limits: dict[str, Any] = {"timeout_s": config.reward.timeout_s, "workers": config.reward.workers}
    limits["weights"] = config.reward.heads or None
    rewards = RewardPool(config.reward.function, model=judge, **limits) if config.reward.function or judge else None
    if rewards is not None:
        await rewards.ready()
    maker = RolloutMaker(
        generators,
        rewards,
        decode=tokenizer.decode,
        sampling=Sampling(
            seed=config.seed,
            temperature=config.rollout.temperature,
            max_new_tokens=config.rollout.max_new_tokens,
        ),
        limits={
            "reward_error": Limit(config.reward.max_failures, "a failed reward", "reward.max_failures"),
            "environment_error": Limit(config.reward.max_failures, "a failed environment", "reward.max_failures"),
            "generation_error": Limit(config.rollout.max_failures, "a failed generator", "rollout.max_failures"),
        },
        shaping=_shaping(config),
        environments=_environments(config, tokenizer),
    )
    folder = storage.fetch(tokens_uri)
    names = prompt_sets(config)
    sets = {name: Prompts(*read_prompts(folder / f"{name}.parquet"), seed=config.seed) for name in names}
    return RolloutParts(generators=generators, maker=maker, sets=sets)


def weights_way(config: RunConfig, resources: Hardware) -> Way:
    """How training sends weights: vLLM takes them from device to device, all others from host memory."""
    if config.rollout.generator != "vllm":
        return "store"
    return "ipc" if resources.shared else "broadcast"


def adapters_apart(config: RunConfig, lora: LoRA | None) -> LoRA | None:
    """The adapters that are sent without the weights that they stand beside; says why if they are merged into those."""
    if lora is None:
        return None
    most = getattr(_generator_class(config), "max_adapter_rank", 0)
    if lora.rank <= most:
        return lora
    why = f"adapters of rank {most} at most" if most else "no adapters"
    print(f"grpo: rollout.generator {config.rollout.generator} takes {why}: each sync sends all weights", flush=True)
    return None


def _generator_class(config: RunConfig) -> type:
    known = {"transformers": TransformersGenerator, "vllm": VllmGenerator}
    path = config.rollout.generator
    return known[path] if path in known else resolve(path, key="rollout.generator")


def _generators(
    config: RunConfig, arguments: dict[str, Any], resources: Hardware, count: int, adapters: LoRA | None
) -> ActorGroup:
    pool, cls = resources.generator, _generator_class(config)
    if adapters is not None and issubclass(cls, VllmGenerator):
        arguments = arguments | {"adapters": (adapters.rank, _modules(adapters))}
    match config.rollout.generator:
        case "transformers":
            pass
        case "vllm":
            arguments = arguments | {
                "max_tokens": config.data.pack_tokens,  # no rollout is longer, of however many turns
                "memory_share": SHARED_MEMORY / resources.shared if resources.shared else OWN_MEMORY,
                "can_sleep": config.rollout.sleep,
            }
            # In turn with training all groups of a step come in one call, whose batches are the same in every run.
            pool = replace(pool, concurrency=CALLS + 1) if config.rollout.max_staleness else pool
        case _:
            pool = replace(pool, concurrency=getattr(cls, "concurrency", pool.concurrency))
    return ActorGroup("generator", cls, [arguments] * count, pool)


def _modules(lora: LoRA) -> list[str]:
    """Last components of the names of what the adapters are on."""
    every = LoRA().targets  # all Linears that the decoder has
    return sorted(
        {name.rpartition(".")[2] for each in lora.targets for name in (every if each == ALL_LINEAR else [each])}
    )


def _environments(config: RunConfig, tokenizer: BaseHFModelTokenizer) -> Environments | None:
    assert config.reward is not None, "as above"
    if config.rollout.environment is None:
        return None
    limits = {"turn_s": config.reward.timeout_s, "workers": config.reward.workers}
    return Environments(config.rollout.environment, tokenizer=tokenizer, **limits)


def _shaping(config: RunConfig) -> Shaping:
    """RL's treatment of groups; the other recipes sample for their evaluation alone."""
    method = config.method
    if not isinstance(method, GRPO):
        return Shaping()
    return Shaping(overlong_tokens=method.overlong_tokens, replace_silent=method.replace_silent)
