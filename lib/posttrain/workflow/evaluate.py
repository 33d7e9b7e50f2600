"""Held-out rows become numbers: greedy reward, sampled reward, the best of k, and pass@k."""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from posttrain.data.slices import slice_of
from posttrain.data.types import Prompt
from posttrain.errors import RewardError
from posttrain.workflow.measures import PASS, pass_names
from posttrain.workflow.rollouts import Dropped, Group, Prompts, RolloutMaker
from posttrain.workflow.supervise import supervised

EVAL_SEED = 7_919
"""Sampling noise of every evaluation, whatever the run's seed: models are compared on paired draws."""

PASSED = 1 - 1e-6
"""A completion with this reward or more is solved: 1 but for the rounding of parts that sum to it. A fixed bar, not the
best reward that was seen, which would be another one for every model."""


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

    async def full(
        self, *, samples: int, passes: bool = True, slice_by: str | None = None, per_row: str | None = None
    ) -> dict[str, Any]:
        """Greedy reward, mean reward of `samples` draws and of its parts, mean best of them, pass@k, mean length, and
        a few rows.

        Args:
            passes: off where a reward of 1 does not mean that the answer is right.
            slice_by: column of the rows; the same numbers are then also told for each of its values, in `slices`.
            per_row: greedy_reward or sampled_reward, which is then also told of every row, in `scores`.
        """
        greedy = await self._groups(samples=1, temperature=0.0)
        drawn = await self._groups(samples=samples, temperature=self.maker.sampling.temperature)
        both = {g[0].prompt.uid for g in greedy} & {g[0].prompt.uid for g in drawn}
        greedy, drawn = ([g for g in groups if g[0].prompt.uid in both] for groups in (greedy, drawn))
        found = {
            "rows": len(drawn),
            "failed_rows": len(self.prompts) - len(both),
            "samples": samples,
            **reward_measures(greedy, drawn, passes=passes),
            "parts": part_means(drawn),
            "examples": [_example(group[0]) for group in greedy[:8]],
        }
        if per_row is not None:
            found["scores"] = row_rewards({"greedy_reward": greedy, "sampled_reward": drawn}[per_row])
        return found if slice_by is None else found | {"slices": by_slice(greedy, drawn, slice_by, passes=passes)}

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


def reward_measures(greedy: Sequence[Group], drawn: Sequence[Group], *, passes: bool) -> dict[str, float]:
    """Means over the scored groups of the same prompts: one greedy completion each, and all that were drawn."""
    found = {
        "greedy_reward": _mean_reward(greedy),
        "sampled_reward": _mean_reward(drawn),
        "best_reward": fmean(max(_rewards(group)) for group in drawn),
    }
    if passes:
        solved = [(len(group), sum(reward >= PASSED for reward in _rewards(group))) for group in drawn]
        for name in pass_names(len(drawn[0])):
            found[name] = fmean(pass_at_k(n, c, int(name.removeprefix(PASS))) for n, c in solved)
    found = {name: round(value, 4) for name, value in found.items()}
    return found | {"mean_tokens": round(fmean(len(r.token_ids) for group in drawn for r in group), 2)}


def row_rewards(groups: Sequence[Group]) -> dict[str, float]:
    """Number of each prompt -> mean reward of its completions."""
    return {str(group[0].prompt.uid): fmean(_rewards(group)) for group in groups}


def part_means(groups: Sequence[Group]) -> dict[str, float]:
    """Means of the named parts of the rewards, over the completions that have them."""
    every = [rollout.parts for group in groups for rollout in group]
    names = sorted(set().union(*every) - {"reward"})
    return {name: round(fmean(parts[name] for parts in every if name in parts), 4) for name in names}


def by_slice(
    greedy: Sequence[Group], drawn: Sequence[Group], column: str, *, passes: bool
) -> dict[str, dict[str, float]]:
    """reward_measures() of the prompts of every slice, and how many they are."""
    found = {}
    for name in sorted({slice_of(group[0].prompt.row, column) for group in drawn}):
        mine = [[g for g in groups if slice_of(g[0].prompt.row, column) == name] for groups in (greedy, drawn)]
        found[name] = {"rows": len(mine[1]), **reward_measures(*mine, passes=passes)}
    return found


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples solves a prompt, from more: 1 - C(n-c, k) / C(n, k) with
    n samples of which c are right (arXiv:2107.03374, eq. 1)."""
    return 1.0 - math.comb(samples - solved, k) / math.comb(samples, k)


def last_user_text(row: dict[str, Any]) -> str:
    """The question of a row, for people."""
    if "messages" in row:
        return str(row["messages"][-1]["content"])
    return str(row["prompt"])


def _mean_reward(groups: Sequence[Group]) -> float:
    return fmean(reward for group in groups for reward in _rewards(group))


def _rewards(group: Group) -> list[float]:
    rewards = [rollout.reward for rollout in group if rollout.reward is not None]
    assert len(rewards) == len(group), "evaluation of unscored rollouts"
    return rewards


def _example(rollout: Any) -> dict[str, Any]:
    return {"prompt": last_user_text(rollout.prompt.row), "completion": rollout.text, "reward": rollout.reward}
