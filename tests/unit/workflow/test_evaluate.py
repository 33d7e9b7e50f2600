"""Rewards of completions become measures: pass@k against the definition, slices against their rows alone."""

from dataclasses import replace
from itertools import combinations

import pytest

from posttrain.data.types import Prompt, Rollout
from posttrain.workflow.evaluate import by_slice, part_means, pass_at_k, reward_measures, row_rewards


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_pass_at_k_is_the_chance_that_one_of_k_drawn_samples_is_right(samples: int):
    for solved in range(samples + 1):
        for k in range(1, samples + 1):
            drawn = list(combinations([True] * solved + [False] * (samples - solved), k))
            assert pass_at_k(samples, solved, k) == pytest.approx(sum(map(any, drawn)) / len(drawn))


def group(uid: int, *rewards: float, **row: str) -> list[Rollout]:
    prompt = Prompt(uid=uid, token_ids=(1,), row={"messages": [{"role": "user", "content": "?"}], **row})
    kept = {"token_ids": (1, 2), "logprobs": (), "versions": (), "finish_reason": "stop"}
    return [Rollout(prompt=prompt, sample_index=i, reward=r, **kept) for i, r in enumerate(rewards)]


def test_a_reward_of_one_is_a_pass_but_for_the_rounding_of_its_parts():
    assert 0.7 + 0.2 + 0.1 < 1
    drawn = [group(0, 0.7 + 0.2 + 0.1, 0.0, 0.0, 0.0), group(1, 0.99, 0.5, 2.0, 1.0)]
    found = reward_measures([group(0, 0.0), group(1, 1.0)], drawn, passes=True)
    assert found["pass@1"] == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert found["pass@2"] == pytest.approx((1 / 2 + (1 - 1 / 6)) / 2, abs=1e-4)
    assert found["pass@4"] == 1.0 and found["greedy_reward"] == 0.5
    assert not any(name.startswith("pass@") for name in reward_measures(drawn, drawn, passes=False))


def test_slices_of_prompts_have_their_own_measures():
    drawn = [group(0, 1.0, 0.0, lang="de"), group(1, 0.0, 0.0, lang="en"), group(2, 1.0, 1.0, lang="de")]
    found = by_slice([each[:1] for each in drawn], drawn, "lang", passes=True)
    assert found["de"]["rows"] == 2 and found["de"]["pass@1"] == found["de"]["sampled_reward"] == 0.75
    assert found["en"]["rows"] == 1 and found["en"]["pass@2"] == 0.0


def test_the_score_of_a_row_is_the_mean_reward_of_its_completions():
    drawn = [group(3, 1.0, 0.0), group(5, 0.25, 0.75), group(8, 1.0, 1.0)]
    assert row_rewards(drawn) == {"3": 0.5, "5": 0.5, "8": 1.0}
    assert reward_measures(drawn, drawn, passes=False)["sampled_reward"] == pytest.approx(2 / 3, abs=1e-4)


def test_parts_of_rewards_are_told_by_their_names_over_those_that_have_them():
    drawn = [[replace(r, parts={"right": r.reward, "length": -0.5} if n else {"right": 1.0}) for n, r in enumerate(g)]
             for g in (group(0, 1.0, 0.0), group(1, 0.0, 0.5))]  # fmt: skip
    assert part_means(drawn) == {"length": -0.5, "right": 0.625}
    assert part_means([group(0, 1.0)]) == {}
