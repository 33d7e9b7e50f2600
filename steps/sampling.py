"""What sampling and scoring need, from the config: shared by the training and the evaluation step."""

from dataclasses import dataclass
from typing import Any

from posttrain import storage
from posttrain.compute.generator.transformers import TransformersGenerator
from posttrain.compute.workers import ActorGroup
from posttrain.config import RunConfig
from posttrain.config_method import GRPO
from posttrain.data.prompts import read_prompts
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.plugin import resolve
from posttrain.workflow.environments import Environments
from posttrain.workflow.generators import Generators
from posttrain.workflow.reward_pool import RewardPool
from posttrain.workflow.rollouts import Limit, Prompts, RolloutMaker, Sampling, Shaping
from steps.hardware import Hardware
from steps.origin import locate
from steps.recipes import prompt_sets


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutParts:
    """Generators, a reward process, and the sets of prompts by name."""

    generators: Generators
    maker: RolloutMaker
    sets: dict[str, Prompts]


async def rollout_parts(
    config: RunConfig, *, model_uri: str, tokens_uri: str, resources: Hardware, count: int = 1
) -> RolloutParts:
    """Start `count` generators of `model_uri`'s architecture and a reward process, and read the prompts."""
    assert config.reward is not None, "the config's own check asks for a reward where completions are scored"
    tokenizer = BaseHFModelTokenizer(storage.fetch(model_uri))
    choice = config.rollout.generator
    cls = TransformersGenerator if choice == "transformers" else resolve(choice, key="rollout.generator")
    arguments = {"model_uri": model_uri, "stop_ids": tokenizer.stop_ids, "pad_id": tokenizer.pad_id}
    generators = Generators(
        ActorGroup("generator", cls, [arguments] * count, resources.generator),
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
