"""Rollouts are kept whole, once a step, and become rows of the next run with the tokens that were sampled."""

import json

import pyarrow.parquet as pq
import pytest

from posttrain.data.rollout_rows import best_rows, pair_rows
from posttrain.data.types import Prompt, Rollout
from posttrain.errors import DataError, RewardError
from posttrain.workflow.rollout_file import RolloutFile, file_of
from posttrain.workflow.rollouts import Dropped
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def prompt_of(tokenizer, uid, question="sort 31"):
    row = {"messages": [{"role": "user", "content": question}], "answer": "13"}
    return Prompt(uid=uid, token_ids=tuple(tokenizer.prompt(row["messages"])), row=row)


def rollout_of(tokenizer, uid, sample, text, reward, **changes):
    ids = (*tokenizer.hf.encode(text, add_special_tokens=False), tokenizer.stop_id)
    return Rollout(
        **{
            "prompt": prompt_of(tokenizer, uid),
            "sample_index": sample,
            "token_ids": ids,
            "logprobs": (-0.25,) * len(ids),
            "versions": (4,) * len(ids),
            "finish_reason": "stop",
            "text": text,
            "reward": reward,
            "parts": {"exact": reward},
            "latency_s": 0.5,
            **changes,
        }
    )


def group_of(tokenizer, uid, **rewards):
    return [rollout_of(tokenizer, uid, i, text, reward) for i, (text, reward) in enumerate(rewards.items())]


def test_a_step_is_one_file_and_one_row_group_with_all_that_is_known(tokenizer, root_uri, tmp_path):
    file = RolloutFile(f"{root_uri}/rollouts")
    file.rollouts(7, [group_of(tokenizer, 3, a=1.0, b=0.0)])
    from posttrain import storage

    (tmp_path / "step.parquet").write_bytes(storage.read_bytes(file_of(file.uri, 7)))
    found = pq.ParquetFile(tmp_path / "step.parquet")
    assert found.num_row_groups == 1
    first, second = found.read().to_pylist()
    assert (first["step"], first["uid"], first["sample_index"], second["sample_index"]) == (7, 3, 0, 1)
    rollout = rollout_of(tokenizer, 3, 0, "a", 1.0)
    assert tuple(first["prompt_ids"] + first["token_ids"]) == rollout.prompt.token_ids + rollout.token_ids
    assert first["loss_mask"] == [1.0] * len(rollout.token_ids) and first["versions"] == [4] * len(rollout.token_ids)
    assert first["logprobs"] == [-0.25] * len(rollout.token_ids)
    assert (first["reward"], dict(first["parts"]), first["text"], first["latency_s"]) == (1.0, {"exact": 1.0}, "a", 0.5)
    assert json.loads(first["row"]) == rollout.prompt.row and first["drop_reason"] is None


def test_dropped_groups_are_kept_with_their_reason(tokenizer, tmp_path):
    file = RolloutFile(str(tmp_path))
    failed = Dropped(reason="reward_error", error=RewardError("the verifier is down"))
    silent = Dropped(reason="no_signal", rollouts=tuple(group_of(tokenizer, 9, a=0.0, b=0.0)))
    dropped = [(prompt_of(tokenizer, 8), failed), (prompt_of(tokenizer, 9), silent)]
    file.rollouts(0, [group_of(tokenizer, 3, a=1.0, b=0.0)], dropped)
    file.rollouts(1, [group_of(tokenizer, 4, a=1.0, b=0.0)])
    rows = pq.read_table(file_of(str(tmp_path), 0)).to_pylist()
    assert [(row["uid"], row["drop_reason"]) for row in rows[2:]] == [
        (8, "reward_error"),
        (9, "no_signal"),
        (9, "no_signal"),
    ]
    assert (rows[2]["drop_cause"], rows[2]["token_ids"], rows[2]["reward"]) == ("the verifier is down", None, None)
    assert pq.read_table(file_of(str(tmp_path), 1)).num_rows == 2


def test_a_step_that_a_resume_repeats_occurs_once(tokenizer, tmp_path):
    for text in ("a", "b"):
        RolloutFile(str(tmp_path)).rollouts(2, [group_of(tokenizer, 3, **{text: 1.0})])
    table = pq.read_table(tmp_path).to_pylist()
    assert [(row["step"], row["text"]) for row in table] == [(2, "b")]


def test_a_file_that_cannot_be_written_is_told_and_stops_nothing(tokenizer, tmp_path, capsys):
    (tmp_path / "rollouts").write_text("in the way")
    file = RolloutFile(str(tmp_path / "rollouts"))
    file.rollouts(0, [group_of(tokenizer, 3, a=1.0)])
    assert file.failures == 1
    assert "WARNING: the rollouts of step 1 are not kept, 1 so far" in capsys.readouterr().out


def written(tokenizer, tmp_path):
    file = RolloutFile(str(tmp_path))
    dropped = [(prompt_of(tokenizer, 8), Dropped(reason="no_signal", rollouts=()))]
    groups = [group_of(tokenizer, 0, **{"31": 0.0, "13": 1.0}), group_of(tokenizer, 1, a=1.0, b=1.0)]
    file.rollouts(0, groups, dropped)
    cut = [rollout_of(tokenizer, 2, i, text, float(i), finish_reason="length") for i, text in enumerate("ab")]
    file.rollouts(1, [group_of(tokenizer, 3, a=0.2, b=0.1), cut])
    return str(tmp_path)


def test_the_best_of_a_group_becomes_a_row_whose_tokens_are_the_sampled_ones(tokenizer, tmp_path):
    rows = list(best_rows(written(tokenizer, tmp_path)))
    assert [row["messages"][-1] for row in rows] == [
        {"role": "assistant", "content": "13"},
        {"role": "assistant", "content": "a"},
    ]
    ids, mask = tokenizer.conversation(rows[0]["messages"])
    sampled = rollout_of(tokenizer, 0, 1, "13", 1.0)
    prompt = sampled.prompt.token_ids
    trained = prompt + sampled.token_ids
    assert tuple(ids[: len(trained)]) == trained
    assert mask[: len(trained)] == [0.0] * len(prompt) + [1.0] * len(sampled.token_ids)


def test_a_least_reward_keeps_good_groups_that_are_all_alike(tokenizer, tmp_path):
    rows = list(best_rows(written(tokenizer, tmp_path), min_reward=1.0))
    assert [row["messages"][-1]["content"] for row in rows] == ["13", "a"]
    with pytest.raises(DataError, match="good enough for min_reward = 2"):
        list(best_rows(str(tmp_path), min_reward=2.0))


def test_the_best_against_the_worst_is_a_preference(tokenizer, tmp_path):
    rows = list(pair_rows(written(tokenizer, tmp_path), min_gap=0.5))
    assert rows == [
        {
            "prompt": [{"role": "user", "content": "sort 31"}],
            "chosen": [{"role": "assistant", "content": "13"}],
            "rejected": [{"role": "assistant", "content": "31"}],
        }
    ]
    with pytest.raises(DataError, match="differ by more than 5"):
        list(pair_rows(str(tmp_path), min_gap=5))


def test_an_episode_of_several_turns_becomes_a_conversation_and_no_pair(tokenizer, tmp_path):
    turns = tuple(
        {"role": role, "content": text} for role, text in (("assistant", "5"), ("tool", "up"), ("assistant", "7"))
    )
    group = [rollout_of(tokenizer, 0, i, "5 up 7", float(i), turns=turns) for i in range(2)]
    RolloutFile(str(tmp_path)).rollouts(0, [group])
    (row,) = best_rows(str(tmp_path))
    assert [message["content"] for message in row["messages"]] == ["sort 31", "5", "up", "7"]
    with pytest.raises(DataError):
        list(pair_rows(str(tmp_path)))
