"""Environments of other interfaces play through the adapters; the classes here have those packages' shapes."""

import asyncio
import random

from posttrain.data.environment_adapters import GymEnvironment, VerifiersEnvironment


class Talk:
    """The policy says the given texts, then is out of tokens; remembers what it was told."""

    def __init__(self, *texts):
        self.texts, self.told, self.random = list(texts), [], random.Random(0)

    async def turn(self, *messages):
        self.told.append([message["content"] for message in messages])
        return self.texts.pop(0) if self.texts else None


class Counter:
    """As gymnasium.Env: counts up to 3; the action is what to add."""

    closed = False

    def reset(self, *, seed=None, options=None):
        self.count, self.seed = 0, seed
        return self.count, {}

    def step(self, action):
        self.count += action
        return self.count, float(self.count == 3), self.count >= 3, False, {}

    def close(self):
        self.closed = True


def test_a_gymnasium_environment_is_played_to_its_end_and_closed():
    made = []
    env = GymEnvironment(lambda row: made.append(Counter()) or made[0], show=lambda o: f"at {o}", act=int)
    talk = Talk("1", "2", "5")
    assert asyncio.run(env.rollout({}, talk)) == 1.0
    assert talk.told == [["at 0"], ["at 1"]] and made[0].closed and isinstance(made[0].seed, int)


def test_a_gymnasium_episode_that_is_out_of_tokens_keeps_what_it_earned():
    env = GymEnvironment(lambda row: Counter(), act=int)
    assert asyncio.run(env.rollout({}, Talk("1"))) == 0.0


class Echo:
    """As verifiers' MultiTurnEnv."""

    async def setup_state(self, state):
        return {**state, "echoes": 0}

    async def is_completed(self, messages, state):
        return messages[-1]["content"] == "stop"

    async def env_response(self, messages, state):
        state["echoes"] += 1
        return [{"role": "user", "content": f"you said {messages[-1]['content']}"}], state


def test_a_verifiers_environment_is_played_until_it_says_that_it_is_over():
    env = VerifiersEnvironment(Echo(), lambda messages, state: {"echoes": state["echoes"], "length": len(messages)})
    talk = Talk("a", "stop", "b")
    row = {"messages": [{"role": "user", "content": "talk"}], "answer": "x"}
    assert asyncio.run(env.rollout(row, talk)) == {"echoes": 1, "length": 4}
    assert talk.told == [[], ["you said a"]]
