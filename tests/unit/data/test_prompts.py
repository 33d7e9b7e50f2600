"""Prompts come back as they were written; one that cannot be asked is named."""

import pytest

from posttrain.data.prompts import read_prompts, tokenize_prompts, write_prompts
from posttrain.errors import DataError
from tiny import tiny_tokenizer

GOOD = {"messages": [{"role": "user", "content": "sort 21"}, {"role": "assistant", "content": "12"}]}
QUESTION = {"messages": GOOD["messages"][:1]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.fault("F36", outcome="REFUSE")
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


def test_prompts_come_back_as_they_were_written(tmp_path):
    rows = [{"prompt": "ä\n\u2028", "nested": {"a": [1, None, 0.1]}}, {"messages": [], "answer": True}]
    token_ids = [(5, 6, 7), (8,)]
    write_prompts(rows, token_ids, tmp_path / "prompts.parquet")
    assert read_prompts(tmp_path / "prompts.parquet") == (rows, token_ids)


def test_a_flipped_bit_in_stored_prompts_is_noticed(tmp_path):
    path = tmp_path / "prompts.parquet"
    write_prompts([{"prompt": "x"}], [tuple(range(70_000))], path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(OSError, match="CRC"):
        read_prompts(path)
