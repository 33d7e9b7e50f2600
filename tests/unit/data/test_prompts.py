"""Token Parquet comes back as it was written; a row that cannot be trained on is named."""

import numpy as np
import pytest

from posttrain.data.sample import shift
from posttrain.data.tokens import (
    describe,
    read_prompts,
    read_samples,
    tokenize_conversations,
    tokenize_prompts,
    write_prompts,
    write_samples,
)
from posttrain.errors import DataError
from tiny import tiny_tokenizer

GOOD = {"messages": [{"role": "user", "content": "sort 21"}, {"role": "assistant", "content": "12"}]}
QUESTION = {"messages": GOOD["messages"][:1]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_a_conversation_becomes_a_sample_that_trains_its_answer(tokenizer):
    (sample,) = tokenize_conversations([GOOD], tokenizer, key="data.demonstrations")
    ids, mask = tokenizer.conversation(GOOD["messages"])
    assert (sample.input_ids.tolist(), sample.target_ids.tolist()) == (ids[:-1], ids[1:])
    assert sample.loss_mask.tolist() == mask[1:]
    assert tokenizer.hf.decode(sample.target_ids[sample.loss_mask == 1]) == "12<|im_end|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x", "id": 1}, "messages are missing"),
        ({"messages": "sort 21"}, "messages"),
        (QUESTION, r"no trained token in a conversation with roles \['user'\]"),
        ({"messages": [{"role": "assistant"}]}, "content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "None"),
        ({"messages": []}, "empty"),
    ],
)
def test_a_row_that_trains_nothing_is_named(tokenizer, row, message):
    with pytest.raises(DataError, match=rf"^data\.demonstrations, row 1: .*{message}"):
        tokenize_conversations([GOOD, row], tokenizer, key="data.demonstrations")


def test_a_message_of_weight_zero_is_not_trained(tokenizer):
    turns = [GOOD["messages"][0], {"role": "assistant", "content": "9", "weight": 0}, *GOOD["messages"]]
    (sample,) = tokenize_conversations([{"messages": turns}], tokenizer, key="data.demonstrations")
    assert tokenizer.hf.decode(sample.target_ids[sample.loss_mask > 0]) == "12<|im_end|>"


def test_a_prompt_of_exactly_the_limit_is_accepted_and_one_token_more_is_named_with_the_limit(tokenizer):
    length = len(tokenizer.prompt(QUESTION["messages"]))
    longer = {"messages": [{"role": "user", "content": "sort 213"}]}
    tokenize_prompts([QUESTION], tokenizer, key="data.prompts", max_prompt_tokens=length)
    with pytest.raises(DataError) as error:
        tokenize_prompts([QUESTION, longer], tokenizer, key="data.prompts", max_prompt_tokens=length)
    assert str(error.value).startswith(
        f"data.prompts, row 1: the prompt has {length + 1} tokens, data.max_prompt_tokens is {length}; "
    )


@pytest.mark.parametrize(
    "row",
    [{"answer": "12"}, {"messages": []}, {"prompt": 12}, {"messages": "x"}, {"messages": [{"role": "user"}]}],
)
def test_a_row_without_a_prompt_is_named(tokenizer, row):
    with pytest.raises(DataError, match=r"^data\.prompts, row 1: "):
        tokenize_prompts([QUESTION, row], tokenizer, key="data.prompts", max_prompt_tokens=64)


def test_samples_come_back_as_they_were_written(tmp_path):
    samples = [shift(range(n, 2 * n), [0, *[1 / n] * (n - 1)]) for n in (2, 9, 3, 70_000)]
    write_samples(samples, tmp_path / "samples.parquet")
    found = read_samples(tmp_path / "samples.parquet")
    assert len(found) == len(samples)
    for one, other in zip(found, samples, strict=True):
        for name in ("input_ids", "target_ids", "loss_mask"):
            assert getattr(one, name).dtype == getattr(other, name).dtype
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert (one.sampler_logprobs, one.advantages) == (None, None)


def test_prompts_come_back_as_they_were_written(tmp_path):
    rows = [{"prompt": "ä\n\u2028", "nested": {"a": [1, None, 0.1]}}, {"messages": [], "answer": True}]
    token_ids = [(5, 6, 7), (8,)]
    write_prompts(rows, token_ids, tmp_path / "prompts.parquet")
    assert read_prompts(tmp_path / "prompts.parquet") == (rows, token_ids)


def test_a_flipped_bit_in_token_parquet_is_noticed(tmp_path):
    path = tmp_path / "samples.parquet"
    write_samples([shift(range(1000), [1] * 1000)], path)
    data = bytearray(path.read_bytes())
    data[len(data) // 8] ^= 1
    path.write_bytes(data)
    with pytest.raises(OSError, match="CRC"):
        read_samples(path)


def test_statistics_worked_out_by_hand():
    samples = [shift(range(n + 1), [0] * n + [1]) for n in (6, 4, 3)]
    assert describe(samples, pack_tokens=10) == {
        "samples": 3,
        "tokens": 13,
        "loss_tokens": 3,
        "length_quantiles": {"p0": 3, "p50": 4, "p90": 5, "p99": 5, "p100": 6},
        "pack_tokens": 10,
        "predicted_fill": 0.65,
    }
