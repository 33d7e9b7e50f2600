"""Held-out rows become numbers: greedy reward, sampled reward, and the best of k."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from posttrain.data.types import Prompt
from posttrain.errors import RewardError
from posttrain.workflow.rollouts import Dropped, Group, Prompts, RolloutMaker
from posttrain.workflow.supervise import supervised

EVAL_SEED = 7_919
"""Sampling noise of every evaluation, whatever the run's seed: models are compared on paired draws."""


class Evaluator:
    """Scores held-out prompts with the weights that the generators hold."""

    def __init__(self, maker: RolloutMaker, prompts: Prompts):
        self.maker = RolloutMaker(
            maker.generators,
            maker.rewards,
            decode=maker.decode,
            sampling=replace(maker.sampling, seed=EVAL_SEED),
            limits=maker.limits,
            environments=maker.environments,
        )
        self.prompts = prompts.in_order()

    async def quick(self) -> dict[str, float]:
        """eval/reward, the mean of one sample per row at the training temperature, and eval/version, the weights'."""
        groups = await self._groups(samples=1, temperature=self.maker.sampling.temperature)
        version = min(version for (rollout,) in groups for version in rollout.versions)
        return {"eval/reward": _mean_reward(groups), "eval/version": float(version)}

    async def full(self, *, samples: int) -> dict[str, Any]:
        """Greedy reward, mean reward of `samples` draws, mean best of them, mean length, and a few rows."""
        greedy = await self._groups(samples=1, temperature=0.0)
        drawn = await self._groups(samples=samples, temperature=self.maker.sampling.temperature)
        both = {g[0].prompt.uid for g in greedy} & {g[0].prompt.uid for g in drawn}
        greedy, drawn = ([g for g in groups if g[0].prompt.uid in both] for groups in (greedy, drawn))
        return {
            "rows": len(drawn),
            "failed_rows": len(self.prompts) - len(both),
            "samples": samples,
            "greedy_reward": round(_mean_reward(greedy), 4),
            "sampled_reward": round(_mean_reward(drawn), 4),
            "best_reward": round(fmean(max(r.reward or 0.0 for r in group) for group in drawn), 4),
            "mean_tokens": round(fmean(len(r.token_ids) for group in drawn for r in group), 2),
            "examples": [_example(group[0]) for group in greedy[:8]],
        }

    async def _groups(self, *, samples: int, temperature: float) -> list[Group]:
        """Scored groups of all held-out rows but those that were dropped, within the run's limits."""
        dropped: list[Dropped] = []

        async def make(prompt: Prompt) -> Group | Dropped:
            made = await self.maker.make(prompt, samples, temperature=temperature)
            if isinstance(made, Dropped):
                dropped.append(made)
                if made.reason in self.maker.limits:
                    alike = sum(each.reason == made.reason for each in dropped)
                    self.maker.limits[made.reason].check(alike, made)
            return made

        async with supervised() as tasks:
            making = [tasks.create_task(make(prompt)) for prompt in self.prompts]
        groups = [made for task in making if isinstance(made := task.result(), list)]
        if not groups:
            raise RewardError(f"all {len(dropped)} held-out rows were dropped, the last: {dropped[-1].error}")
        return groups


def last_user_text(row: dict[str, Any]) -> str:
    """The question of a row, for people."""
    if "messages" in row:
        return str(row["messages"][-1]["content"])
    return str(row["prompt"])


def _mean_reward(groups: Sequence[Group]) -> float:
    rewards = [rollout.reward for group in groups for rollout in group]
    assert all(reward is not None for reward in rewards), "evaluation of unscored rollouts"
    return fmean(reward for reward in rewards if reward is not None)


def _example(rollout: Any) -> dict[str, Any]:
    return {"prompt": last_user_text(rollout.prompt.row), "completion": rollout.text, "reward": rollout.reward}
