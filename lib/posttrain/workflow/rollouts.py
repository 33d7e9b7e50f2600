"""Prompts become scored groups: admit, generate, score; a group that fails is dropped, counted and replaced."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from posttrain.compute.generator import Completion, Request
from posttrain.compute.workers import ActorGroup
from posttrain.data.advantage import overlong_penalty
from posttrain.data.order import draw
from posttrain.data.rollout import request_seed
from posttrain.data.types import Prompt, Rollout, Row
from posttrain.errors import RewardError
from posttrain.workflow.clock import Clock
from posttrain.workflow.ledger import Ledger
from posttrain.workflow.reward_pool import RewardPool, Scores

Group = list[Rollout]

MAX_SILENT_ROUNDS = 10
"""Rounds of sampling in a row that may give no group with a signal; a task too easy or too hard stops the run."""


class Prompts:
    """Tokenised prompts in their endless order: draw number -> Prompt, a pure function of the seed."""

    def __init__(self, rows: Sequence[Row], token_ids: Sequence[tuple[int, ...]], *, seed: int):
        self.rows, self.token_ids, self.seed = rows, token_ids, seed

    def __getitem__(self, uid: int) -> Prompt:
        row = draw(uid, seed=self.seed, num_rows=len(self.rows))
        return Prompt(uid=uid, token_ids=self.token_ids[row], row=self.rows[row])

    def in_order(self) -> list[Prompt]:
        """Every row once, in file order; for evaluation."""
        return [
            Prompt(uid=i, token_ids=ids, row=row)
            for i, (ids, row) in enumerate(zip(self.token_ids, self.rows, strict=True))
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are drawn."""

    seed: int
    temperature: float
    max_new_tokens: int
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaping:
    """What training does with scored groups before it takes them; evaluation does none of it."""

    overlong_tokens: int | None = None
    """The last so many of max_new_tokens cost reward (advantage.overlong_penalty)."""
    replace_silent: bool = False
    """Drop groups whose rewards are all equal, as they teach nothing, and draw others: dynamic sampling, DAPO,
    arXiv:2503.14476, eq. 11."""


class RolloutMaker:
    """Turns draws into scored groups on the generators.

    Args:
        decode: token ids -> text for the reward.
        max_reward_failures: groups that may be dropped in the whole run; one more stops it.
    """

    def __init__(
        self,
        generators: ActorGroup,
        rewards: RewardPool,
        *,
        decode: Callable[[Sequence[int]], str],
        sampling: Sampling,
        max_reward_failures: int,
        shaping: Shaping = Shaping(),
    ):
        self.generators, self.rewards, self.decode = generators, rewards, decode
        self.sampling, self.max_reward_failures, self.shaping = sampling, max_reward_failures, shaping

    async def collect(
        self, prompts: Prompts, ledger: Ledger, clock: Clock, *, groups: int, group_size: int
    ) -> list[Group]:
        """`groups` scored groups, in draw order; seconds go to the phases "generate" and "reward".

        Raises:
            RewardError: more groups failed than the budget allows, which names the last cause; or no group had
                different rewards in MAX_SILENT_ROUNDS rounds, where those are replaced.
        """
        scored: list[Group] = []
        silent_rounds = 0
        while len(scored) < groups:
            admitted = [prompts[ledger.draw()] for _ in range(groups - len(scored))]
            with clock.phase("generate"):
                made = await self.sample(admitted, samples=group_size, temperature=self.sampling.temperature)
            with clock.phase("reward"):
                found = self._shaped(await self.score(made, ledger), ledger)
            scored += found
            silent_rounds = 0 if found else silent_rounds + 1
            if silent_rounds == MAX_SILENT_ROUNDS and self.shaping.replace_silent:
                raise RewardError(
                    f"method.replace_silent: {MAX_SILENT_ROUNDS} rounds of sampling in a row, the last of "
                    f"{len(admitted)} prompts, gave no group with different rewards: the task is too easy, too hard, "
                    "or the reward does not vary. Fix: other prompts, a larger method.group_size, or replace_silent off"
                )
        return scored

    def _shaped(self, groups: list[Group], ledger: Ledger) -> list[Group]:
        """The groups with the cost of their length, without those that teach nothing."""
        buffer, longest = self.shaping.overlong_tokens, self.sampling.max_new_tokens
        if buffer is not None:
            groups = [[_with_length_cost(r, max_tokens=longest, buffer=buffer) for r in group] for group in groups]
        if not self.shaping.replace_silent:
            return groups
        kept = [group for group in groups if len({rollout.reward for rollout in group}) > 1]
        for _ in range(len(groups) - len(kept)):
            ledger.drop("no_signal")
        return kept

    async def sample(self, prompts: Sequence[Prompt], *, samples: int, temperature: float) -> list[Group]:
        """Unscored groups of `samples` completions a prompt, spread over the generators by prompt."""
        shares = [prompts[i :: len(self.generators)] for i in range(len(self.generators))]
        calls = [(([self._request(p, s, temperature) for p in share for s in range(samples)],), {}) for share in shares]
        answers = await self.generators.call_each("generate", calls, timeout_s=self.sampling.timeout_s)
        groups: dict[int, Group] = {}
        for share, completions in zip(shares, answers, strict=True):
            for i, prompt in enumerate(share):
                made = completions[i * samples : (i + 1) * samples]
                groups[prompt.uid] = [self._rollout(prompt, s, c) for s, c in enumerate(made)]
        return [groups[prompt.uid] for prompt in prompts]

    async def score(self, groups: Sequence[Group], ledger: Ledger) -> list[Group]:
        """The groups with their rewards; one whose reward fails is left out and counted in `ledger`.

        Raises:
            RewardError: more groups failed than the budget allows; names the last cause.
        """
        scored: list[Group] = []
        found = await asyncio.gather(*(self._scores(group) for group in groups))
        for group, scores in zip(groups, found, strict=True):  # in draw order, whatever was scored first
            if isinstance(scores, RewardError):
                prompt, error = group[0].prompt, scores
                failures = ledger.drop("reward_error")
                if failures > self.max_reward_failures:
                    raise RewardError(
                        f"{failures} groups dropped for a failed reward, reward.max_failures is "
                        f"{self.max_reward_failures}; the last: {error}"
                    ) from None
                print(f"dropped prompt {prompt.uid}: {error}", flush=True)
                continue
            scored.append([replace(r, reward=x, parts=parts) for r, (x, parts) in zip(group, scores, strict=True)])
        return scored

    async def _scores(self, group: Group) -> Scores | RewardError:
        try:
            return await self.rewards.score(group[0].prompt.row, [rollout.text for rollout in group])
        except RewardError as error:
            return error

    def _request(self, prompt: Prompt, sample: int, temperature: float) -> Request:
        return Request(
            token_ids=prompt.token_ids,
            seed=request_seed(self.sampling.seed, prompt.uid, sample, attempt=0),
            temperature=temperature,
            max_new_tokens=self.sampling.max_new_tokens,
        )

    def _rollout(self, prompt: Prompt, sample: int, completion: Completion) -> Rollout:
        return Rollout(
            prompt=prompt,
            sample_index=sample,
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            versions=completion.versions,
            finish_reason=completion.finish_reason,
            text=self.decode(completion.token_ids),
        )


def _with_length_cost(rollout: Rollout, *, max_tokens: int, buffer: int) -> Rollout:
    assert rollout.reward is not None, "only scored rollouts are shaped"
    cost = overlong_penalty(len(rollout.token_ids), max_tokens=max_tokens, buffer=buffer)
    return replace(rollout, reward=rollout.reward + cost, parts=rollout.parts | {"overlong": cost})
