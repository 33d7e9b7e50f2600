"""A prompt becomes a scored group of rollouts, or is dropped with a reason: one coroutine a group.

Who calls decides how many are under way at once, and what becomes of those that are dropped.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from posttrain.compute.generator import Completion, Request
from posttrain.data.advantage import overlong_penalty
from posttrain.data.order import draw
from posttrain.data.rollout import request_seed
from posttrain.data.types import Prompt, Rollout, Row
from posttrain.errors import EpisodeError, GenerationError, PosttrainError, RewardError
from posttrain.workflow.environments import Environments, last_turn
from posttrain.workflow.generators import Generators
from posttrain.workflow.reward_pool import RewardPool

Group = list[Rollout]

MOST_DROPPED = 1_000
"""Dropped groups that are held between two steps for who keeps rollouts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A prompt that gave no group to train on."""

    reason: str
    """What it is counted under: "reward_error", "generation_error", "no_signal"."""
    error: PosttrainError | None = None
    """What failed, if anything did."""
    rollouts: tuple[Rollout, ...] = ()
    """The group, where it was scored."""


DroppedGroup = tuple[Prompt, Dropped]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaping:
    """What training does with scored groups before it takes them; evaluation does none of it."""

    overlong_tokens: int | None = None
    """The last so many of max_new_tokens cost reward (advantage.overlong_penalty)."""
    replace_silent: bool = False
    """Drop groups whose rewards are all equal, as they teach nothing, and draw others: dynamic sampling, DAPO,
    arXiv:2503.14476, eq. 11."""


@dataclass(frozen=True, slots=True)
class Limit:
    """How many groups of a run may be dropped for one reason."""

    most: int
    what: str
    """In words: "a failed reward"."""
    key: str
    """The config key that says `most`."""

    def check(self, count: int, dropped: Dropped) -> None:
        """Raise an error of the kind that dropped the last group if `count` are too many."""
        if count > self.most and dropped.error is not None:
            text = f"{count} groups dropped for {self.what}, {self.key} is {self.most}; the last: {dropped.error}"
            raise type(dropped.error)(text)


class RolloutMaker:
    """Turns prompts into scored groups on the generators.

    Args:
        decode: token ids -> text for the reward.
        limits: reason -> how many groups a run may drop for it; for reasons that are not named any number.
    """

    def __init__(
        self,
        generators: Generators,
        rewards: RewardPool | None,
        *,
        decode: Callable[[Sequence[int]], str],
        sampling: Sampling,
        limits: dict[str, Limit],
        shaping: Shaping = Shaping(),
        environments: Environments | None = None,
    ):
        self.generators, self.rewards, self.decode = generators, rewards, decode
        self.sampling, self.limits, self.shaping = sampling, limits, shaping
        self.environments = environments
        self._dropped: deque[DroppedGroup] = deque(maxlen=MOST_DROPPED)

    async def make(
        self,
        prompt: Prompt,
        group_size: int,
        *,
        temperature: float | None = None,
        began: Callable[[], None] = lambda: None,
    ) -> Group | Dropped:
        """Sample `group_size` completions, and score them together.

        Args:
            temperature: in place of the run's.
            began: called when the requests leave for a generator.

        Raises:
            ComputeError: a generator hung, or died and may not be replaced.
        """
        temperature = self.sampling.temperature if temperature is None else temperature
        try:
            start = time.monotonic()
            group = await self._sample(prompt, group_size, temperature, began)
            latency_s = time.monotonic() - start
            group = await self._scored([replace(rollout, latency_s=latency_s) for rollout in group])
        except GenerationError as error:
            return self._drop(prompt, Dropped(reason="generation_error", error=error))
        except EpisodeError as error:
            return self._drop(prompt, Dropped(reason="environment_error", error=error))
        except RewardError as error:
            return self._drop(prompt, Dropped(reason="reward_error", error=error))
        made = self._shaped(group)
        return self._drop(prompt, made) if isinstance(made, Dropped) else made

    async def _sample(self, prompt: Prompt, group_size: int, temperature: float, began: Callable[[], None]) -> Group:
        requests = [self._request(prompt, sample, temperature) for sample in range(group_size)]
        if self.environments is None:
            completions = await self.generators.generate(requests, began)
            return [self._rollout(prompt, sample, completion) for sample, completion in enumerate(completions)]
        return await self.environments.play(
            prompt,
            requests,
            lambda asked: self.generators.generate(asked, began),
            lambda sample, turn: request_seed(self.sampling.seed, prompt.uid, sample, attempt=turn),
        )

    async def _scored(self, group: Group) -> Group:
        """The group with its rewards, where an environment has not given them."""
        if all(rollout.reward is not None for rollout in group):
            return group
        if self.rewards is None:
            raise RewardError("the environment gave no reward, and the config has none: set reward.function")
        scores = await self.rewards.score(group[0].prompt.row, [last_turn(rollout) for rollout in group])
        return [replace(r, reward=x, parts=parts) for r, (x, parts) in zip(group, scores, strict=True)]

    def _drop(self, prompt: Prompt, dropped: Dropped) -> Dropped:
        if dropped.error is not None:
            print(f"dropped prompt {prompt.uid}: {dropped.error}", flush=True)
        self._dropped.append((prompt, dropped))
        return dropped

    @property
    def notes(self) -> list[str]:
        """What a person should know of the rewards, each once; who shows a note takes it away."""
        return [] if self.rewards is None else self.rewards.notes

    def metrics(self) -> dict[str, float]:
        """Groups so far that had other rewards when they were scored again, where there are any."""
        differed = 0 if self.rewards is None else self.rewards.differed
        return {"reward/nondeterministic": float(differed)} if differed else {}

    def take_dropped(self) -> list[DroppedGroup]:
        """What was dropped since the last call, of it the latest MOST_DROPPED."""
        taken = list(self._dropped)
        self._dropped.clear()
        return taken

    def _shaped(self, group: Group) -> Group | Dropped:
        """The group with the cost of its length, if it teaches anything."""
        buffer, longest = self.shaping.overlong_tokens, self.sampling.max_new_tokens
        if buffer is not None:
            group = [_with_length_cost(rollout, max_tokens=longest, buffer=buffer) for rollout in group]
        silent = len({rollout.reward for rollout in group}) == 1
        return Dropped(reason="no_signal", rollouts=tuple(group)) if silent and self.shaping.replace_silent else group

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
