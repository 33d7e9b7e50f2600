"""Held-out rows become numbers: greedy reward, sampled reward, and the best of k."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from posttrain.errors import RewardError
from posttrain.workflow.ledger import Ledger
from posttrain.workflow.rollouts import Group, Prompts, RolloutMaker

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
            max_reward_failures=maker.max_reward_failures,
        )
        self.prompts = prompts.in_order()

    async def quick(self) -> float:
        """Mean reward of one sample per row at the training temperature."""
        return _mean_reward(await self._groups(samples=1, temperature=self.maker.sampling.temperature))

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
        """Scored groups of all held-out rows but those whose reward failed, within the run's budget."""
        groups = await self.maker.sample(self.prompts, samples=samples, temperature=temperature)
        scored = await self.maker.score(groups, Ledger())
        if not scored:
            raise RewardError(f"the reward failed on all {len(groups)} held-out rows")
        return scored


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
