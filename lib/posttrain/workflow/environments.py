"""Episodes of several turns: foreign code in child processes, its words as tokens here, one group at a time together.

Token-exact: what the policy sampled stays as sampled, what the environment said is appended as the template's tokens
with loss_mask 0. An environment that raises or hangs costs its group. One that blocks or kills its process takes the
groups beside it along: each is played again from its start, alone in a process of its own, so that only the guilty is
dropped.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from posttrain.compute.child import Child
from posttrain.compute.generator import Completion, Request
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.turns import TurnTokens
from posttrain.data.types import Prompt, Rollout
from posttrain.deadline import DeadlineError
from posttrain.errors import ComputeError, DataError, EpisodeError

START_SECONDS = 120
PING_SECONDS = 5.0
EPISODE_TURNS = 10
"""Deadlines of a turn that an environment may spend on one episode."""
HOST = "posttrain.data.environment:EnvironmentHost"

Generate = Callable[[Sequence[Request]], Awaitable[list[Completion]]]
TurnSeed = Callable[[int, int], int]
"""Sample index and turn -> seed of the request."""


class _LostError(Exception):
    """The process is gone, through this episode or another."""


@dataclass(eq=False)
class _Episode:
    """One sample's tokens after the prompt, with what is known of each."""

    prompt: Prompt
    sample: int
    key: str
    room: int
    """Tokens that it may still have."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    loss_mask: list[float] = field(default_factory=list)
    turns: list[dict[str, str]] = field(default_factory=list)
    finish_reason: str = ""
    spent_s: float = 0.0
    """In the environment."""
    reward: tuple[float, dict[str, float]] | None = None
    ended: bool = False

    def append(self, ids: Sequence[int], logprobs: Sequence[float], versions: Sequence[int], weight: float) -> None:
        self.token_ids += ids
        self.logprobs += logprobs
        self.versions += versions
        self.loss_mask += [weight] * len(ids)
        self.room -= len(ids)


class Environments:
    """The processes that hold a run's environment.

    Args:
        environment: import path of an Environment.
        turn_s: for an environment to go on after a turn of the policy; EPISODE_TURNS times that for an episode.
        workers: processes; each holds many episodes.
    """

    def __init__(self, environment: str, *, tokenizer: BaseHFModelTokenizer, turn_s: float, workers: int = 1):
        self.environment, self.tokenizer, self.tokens = environment, tokenizer, TurnTokens(tokenizer)
        self.turn_s, self.episode_s = turn_s, EPISODE_TURNS * turn_s
        self._children: list[asyncio.Task[Child] | None] = [None] * workers
        self._alone = asyncio.Semaphore(workers)

    async def play(
        self, prompt: Prompt, requests: Sequence[Request], generate: Generate, seed: TurnSeed
    ) -> list[Rollout]:
        """One episode for every request, all of one prompt; their turns are sampled together.

        Raises:
            EpisodeError: an episode raised, did not go on in time, killed its process, or said what cannot be a turn.
            RewardError: it returned what is no reward.
        """
        try:
            return await self._play(await self._child(prompt.uid), prompt, requests, generate, seed)
        except _LostError:
            async with self._alone:
                child = await self._start("environment, alone")
                try:
                    return await self._play(child, prompt, requests, generate, seed)
                except _LostError as error:
                    raise EpisodeError(str(error)) from None
                finally:
                    child.kill()

    async def _play(
        self, child: Child, prompt: Prompt, requests: Sequence[Request], generate: Generate, seed: TurnSeed
    ) -> list[Rollout]:
        episodes = [
            _Episode(prompt, sample, uuid.uuid4().hex, request.max_new_tokens)
            for sample, request in enumerate(requests)
        ]
        turn = 0
        try:
            starts = [self._ask(child, e, "start", prompt.row, seed(e.sample, -1)) for e in episodes]
            await _all(starts)
            while living := [episode for episode in episodes if not episode.ended]:
                asking = [e for e in living if e.room > 0 and e.finish_reason != "length"]
                made = (
                    await generate(
                        [
                            replace(
                                requests[e.sample],
                                token_ids=e.prompt.token_ids + tuple(e.token_ids),
                                seed=seed(e.sample, turn),
                                max_new_tokens=e.room,
                            )
                            for e in asking
                        ]
                    )
                    if asking
                    else []
                )
                said = dict(zip(asking, made, strict=True))
                await _all([self._go_on(child, e, said.get(e)) for e in living])
                turn += 1
        finally:
            left = [episode.key for episode in episodes if not episode.ended]
            await asyncio.gather(*(_quietly(child.call("end", key, timeout_s=PING_SECONDS)) for key in left))
        return [self._rollout(episode) for episode in episodes]

    async def _go_on(self, child: Child, episode: _Episode, made: Completion | None) -> None:
        text = None
        if made is not None:
            text = self.tokenizer.decode(made.token_ids)
            episode.append(made.token_ids, made.logprobs, made.versions, 1.0)
            episode.turns.append({"role": "assistant", "content": text})
            episode.finish_reason = made.finish_reason
        await self._ask(child, episode, "go_on", text)

    async def _ask(self, child: Child, episode: _Episode, method: str, *args: Any) -> None:
        """Let the environment go on with one episode, and take what it says."""
        left = min(self.turn_s, self.episode_s - episode.spent_s)
        start = time.monotonic()
        try:
            reply = await child.call(method, episode.key, *args, timeout_s=max(0.0, left))
        except DeadlineError:
            what = f"{self.environment} did not go on in {left:g} s after {len(episode.turns)} messages"
            if await _answers(child):
                raise EpisodeError(what) from None
            child.kill()
            raise _LostError(f"{what}, and blocks its process") from None
        except ComputeError as error:
            raise _LostError(f"{self.environment}: {error}") from None
        episode.spent_s += time.monotonic() - start
        if "reward" in reply:
            episode.reward, episode.ended = reply["reward"], True
        else:
            self._say(episode, reply["ask"])

    def _say(self, episode: _Episode, messages: list[dict[str, str]]) -> None:
        """Append the environment's words; where they leave no room for an answer, the episode is cut here."""
        row, tools = episode.prompt.row, episode.prompt.row.get("tools")
        try:
            if episode.token_ids:
                ids = self.tokens.after(messages, tools) if episode.finish_reason != "length" else ()
            elif messages:
                asked = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
                opening = tuple(self.tokenizer.prompt([*asked, *messages], tools))
                episode.room -= len(opening) - len(episode.prompt.token_ids)
                episode.prompt = replace(episode.prompt, token_ids=opening, row=row | {"messages": [*asked, *messages]})
                return
            else:
                return
        except DataError as error:
            raise EpisodeError(f"{self.environment}: {error}") from None
        if len(ids) >= episode.room or episode.finish_reason == "length":
            episode.room = 0
            return
        episode.append(ids, [0.0] * len(ids), [episode.versions[-1]] * len(ids), 0.0)
        episode.turns += messages

    def _rollout(self, episode: _Episode) -> Rollout:
        if not episode.token_ids:
            raise EpisodeError(f"{self.environment} ended before the policy's first turn")
        cut = len(episode.loss_mask) - episode.loss_mask[::-1].index(1.0)  # words that nobody answered train nothing
        rollout = Rollout(
            prompt=episode.prompt,
            sample_index=episode.sample,
            token_ids=tuple(episode.token_ids[:cut]),
            logprobs=tuple(episode.logprobs[:cut]),
            versions=tuple(episode.versions[:cut]),
            finish_reason=episode.finish_reason,
            text=self.tokenizer.decode(episode.token_ids[:cut]),
            loss_mask=tuple(episode.loss_mask[:cut]),
            turns=tuple(episode.turns),
        )
        if episode.reward is None:
            return rollout
        reward, parts = episode.reward
        return replace(rollout, reward=reward, parts=parts)

    async def _child(self, uid: int) -> Child:
        slot = uid % len(self._children)
        task = self._children[slot]
        if task is None or (task.done() and (task.exception() or not task.result().alive)):
            task = self._children[slot] = asyncio.ensure_future(self._start(f"environment {slot}"))
        return await asyncio.shield(task)

    async def _start(self, name: str) -> Child:
        return await Child.start(name, HOST, {"environment": self.environment}, timeout_s=START_SECONDS)


def last_turn(rollout: Rollout) -> str:
    """What a reward function reads of a rollout: its completion; of several turns the policy's last."""
    answers = [turn["content"] for turn in rollout.turns if turn["role"] == "assistant"]
    return answers[-1] if answers else rollout.text


async def _all(calls: Sequence[Awaitable[None]]) -> None:
    """All of them, to their end; then the first failure, a lost process before others."""
    found = await asyncio.gather(*calls, return_exceptions=True)
    failures = [each for each in found if isinstance(each, BaseException)]
    if failures:
        raise next((each for each in failures if isinstance(each, _LostError)), failures[0])


async def _answers(child: Child) -> bool:
    try:
        return await child.call("ping", timeout_s=PING_SECONDS)
    except ComputeError:
        return False


async def _quietly(call: Awaitable[Any]) -> None:
    with suppress(ComputeError):  # the process is gone, and the episode with it
        await call
