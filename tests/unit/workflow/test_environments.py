"""Episodes of several turns: exact tokens, and no environment that can wedge a run or take others with it."""

import asyncio

import pytest

from posttrain.compute.generator import Completion, Request
from posttrain.data.guess_number import GuessNumber
from posttrain.data.rollout import group_units
from posttrain.data.turns import TurnTokens
from posttrain.data.types import Prompt
from posttrain.errors import EpisodeError, RewardError
from posttrain.workflow.environments import Environments, last_turn
from tiny import tiny_tokenizer

ROOM = 160


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class Scripted:
    """A generator that says the given texts, one a turn, each with its stop token; remembers what it was asked."""

    def __init__(self, tokenizer, *texts, cut=False):
        self.tokenizer, self.texts, self.cut, self.asked = tokenizer, texts, cut, []

    async def __call__(self, requests):
        self.asked.append(list(requests))
        return [self._say(request) for request in requests]

    def _say(self, request):
        turn = min(len(self.asked), len(self.texts)) - 1
        ids = self.tokenizer.hf.encode(self.texts[turn], add_special_tokens=False)
        ids = tuple(ids if self.cut else [*ids, self.tokenizer.stop_id])[: request.max_new_tokens]
        ended = "stop" if ids[-1] == self.tokenizer.stop_id else "length"
        return Completion(token_ids=ids, logprobs=(-0.5,) * len(ids), versions=(3,) * len(ids), finish_reason=ended)


def prompt_of(tokenizer, uid=0, **fields):
    row = {"messages": [{"role": "user", "content": "find the digit"}], **fields}
    return Prompt(uid=uid, token_ids=tuple(tokenizer.prompt(row["messages"])), row=row)


def play(tokenizer, environment, prompts, *, generate=None, samples=2, room=ROOM, **options):
    """The rollouts or the error of every prompt's group, all under way at once."""
    generate = generate or Scripted(tokenizer, "5")

    async def run():
        limits = {"turn_s": 20.0} | options
        environments = Environments(environment, tokenizer=tokenizer, **limits)

        def one(prompt):
            requests = [
                Request(token_ids=prompt.token_ids, seed=0, temperature=1.0, max_new_tokens=room)
                for _ in range(samples)
            ]
            return environments.play(prompt, requests, generate, lambda sample, turn: 1000 * sample + turn)

        return await asyncio.gather(*map(one, prompts), return_exceptions=True)

    return asyncio.run(run())


def test_tokens_are_those_of_the_whole_conversation_and_only_the_policys_are_trained(tokenizer):
    generate = Scripted(tokenizer, "5", "7")
    prompt = prompt_of(tokenizer, secret=7)
    ((rollout, _),) = play(tokenizer, "posttrain.data.guess_number:GuessNumber", [prompt], generate=generate)
    said = [
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "higher"},
        {"role": "assistant", "content": "7"},
    ]
    assert rollout.turns == tuple(said)
    whole, mask = tokenizer.conversation([*prompt.row["messages"], *said])
    ours = prompt.token_ids + rollout.token_ids
    assert list(ours) == whole[: len(ours)]
    assert list(rollout.loss_mask) == mask[len(prompt.token_ids) : len(ours)] and 0.0 in rollout.loss_mask
    assert rollout.parts == {"found": 1.0, "turns": -0.1} and rollout.reward == 0.9
    assert last_turn(rollout) == "7" and rollout.finish_reason == "stop"
    assert all(p == -0.5 if m else p == 0.0 for p, m in zip(rollout.logprobs, rollout.loss_mask, strict=True))


def test_every_turn_is_asked_with_all_tokens_before_it_and_a_seed_of_its_own(tokenizer):
    generate = Scripted(tokenizer, "5", "7")
    prompt = prompt_of(tokenizer, secret=7)
    ((rollout, _),) = play(tokenizer, "posttrain.data.guess_number:GuessNumber", [prompt], generate=generate)
    first, second = (asked[0] for asked in generate.asked)
    reach = len(rollout.token_ids) - 2  # "7" and its stop token
    assert second.token_ids == prompt.token_ids + rollout.token_ids[:reach]
    assert (first.seed, second.seed, generate.asked[1][1].seed) == (0, 1, 1001)
    assert second.max_new_tokens == ROOM - reach


def test_what_an_environment_wrote_carries_no_loss_and_no_advantage(tokenizer):
    prompt = prompt_of(tokenizer, secret=7)
    generate = Scripted(tokenizer, "5", "7")
    (group,) = play(tokenizer, "posttrain.data.guess_number:GuessNumber", [prompt], generate=generate)
    ((sample,), _) = group_units(group, [0.25, -0.25], by_sequence=True)
    written = [0.0] * (len(prompt.token_ids) - 1) + list(group[0].loss_mask)
    assert (sample.loss_mask > 0).tolist() == [each > 0 for each in written]
    assert sample.loss_mask.sum() == pytest.approx(1.0)
    assert (sample.advantages == 0.25 * (sample.loss_mask > 0)).all()


def test_an_episode_stays_within_its_tokens_and_ends_with_the_policys_words(tokenizer):
    prompt = prompt_of(tokenizer, does="talk for ever")
    for room in (1, 2, 10, 37, 64):
        (group,) = play(tokenizer, "bad_environments:AsTheRowSays", [prompt], room=room, samples=1)
        (rollout,) = group
        assert 0 < len(rollout.token_ids) <= room and rollout.loss_mask[-1] == 1.0


def test_a_turn_that_was_cut_ends_the_episode(tokenizer):
    generate = Scripted(tokenizer, "5", cut=True)
    ((rollout, _),) = play(tokenizer, "bad_environments:AsTheRowSays", [prompt_of(tokenizer)], generate=generate)
    assert (rollout.finish_reason, rollout.parts["turns"], len(generate.asked)) == ("length", 1.0, 1)


def test_chance_of_an_episode_is_a_function_of_its_seed(tokenizer):
    runs = [play(tokenizer, "bad_environments:AsTheRowSays", [prompt_of(tokenizer)]) for _ in range(2)]
    first, second = ([rollout.parts["chance"] for rollout in group] for ((group),) in runs)
    assert first == second and first[0] != first[1]


def test_an_environment_may_speak_first(tokenizer):
    prompt = prompt_of(tokenizer)
    ((rollout, _),) = play(tokenizer, "bad_environments:Opening", [prompt])
    opened = [*prompt.row["messages"], {"role": "user", "content": "the board is empty"}]
    assert list(rollout.prompt.token_ids) == tokenizer.prompt(opened)


def test_an_environment_without_a_reward_leaves_it_to_the_config(tokenizer):
    ((rollout, _),) = play(tokenizer, "bad_environments:AsTheRowSays", [prompt_of(tokenizer, does="no reward")])
    assert rollout.reward is None and last_turn(rollout) == "5"


@pytest.mark.parametrize(
    ("does", "kind", "message"),
    [
        ("raise", EpisodeError, "AsTheRowSays raised KeyError: 'no such room'"),
        ("nan", RewardError, "AsTheRowSays: reward is nan, not a finite number"),
        ("wait for ever", EpisodeError, "AsTheRowSays did not go on in 1 s after 1 messages"),
        ("block for ever", EpisodeError, "AsTheRowSays did not go on in 1 s after 1 messages, and blocks its process"),
        ("die", EpisodeError, "died during go_on().*exit status 3"),
        ("control token", EpisodeError, "the environment's messages.* holds the control token"),
    ],
)
@pytest.mark.fault("F46", outcome="CONTINUE")
def test_an_environment_that_fails_costs_its_group_alone(tokenizer, monkeypatch, does, kind, message):
    monkeypatch.setattr("posttrain.workflow.environments.PING_SECONDS", 1.0)
    prompts = [prompt_of(tokenizer, uid=0), prompt_of(tokenizer, uid=1, does=does), prompt_of(tokenizer, uid=2)]
    before, failed, after = play(tokenizer, "bad_environments:AsTheRowSays", prompts, turn_s=1.0)
    with pytest.raises(kind, match=message.replace("()", r"\(\)")):
        raise failed
    assert [[r.parts["turns"] for r in group] for group in (before, after)] == [[2.0, 2.0]] * 2


def test_control_tokens_and_templates_are_refused_where_the_turn_is_made(tokenizer):
    ids = TurnTokens(tokenizer).after([{"role": "tool", "content": "42"}])
    assert tokenizer.hf.decode(list(ids)) == "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"


def test_the_built_in_game_ends_after_four_turns():
    class Talk:
        said = 0

        async def turn(self, *messages):
            self.said += 1
            return "x"

    talk = Talk()
    assert asyncio.run(GuessNumber().rollout({"secret": 3}, talk)) == {"found": 0.0, "turns": 0.0}
    assert talk.said == 4
