"""Spans of text become weights of tokens: as transformers masks them, in batches, or not at all."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain.data.chat_template import strftime_now
from posttrain.data.masks import turn_weights
from posttrain.data.tokenizer import BaseHFModelTokenizer, Encoded
from posttrain.errors import RowError
from stock_templates import CHATML, save_tokenizer, stock_tokenizer

PIECES = st.sampled_from(
    ["\r\n", "e\u0301", "👩‍👩‍👧", "🏳️‍🌈", "漢字", "\u200b", "\u202e", "<think>", " ", "\n\n", "\t", "ﬁ", "\x00"]
)
CONTENT = (
    st.lists(PIECES | st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=6)
    .map("".join)
    .filter(lambda text: "<|" not in text and "_of_turn>" not in text and "bos>" not in text)
)
TURNS = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3)
CHAT = [
    {"role": "user", "content": "sort 312"},
    {"role": "assistant", "content": "123"},
    {"role": "user", "content": "and 21?"},
    {"role": "assistant", "content": "12"},
]


def conversation(turns):
    return [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]


@pytest.fixture(scope="module", params=["chatml", "qwen2_5", "qwen3", "llama3", "llama3_2", "gemma3"])
def tokenizer(request, tmp_path_factory):
    return stock_tokenizer(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def unmarkable(tmp_path_factory):
    """ChatML whose loop runs over numbers: masks come from proved differences of renderings."""
    loop = "for i in range(messages|length) %}{% set message = messages[i] %}"
    template = CHATML.replace("for message in messages %}", loop)
    return BaseHFModelTokenizer(save_tokenizer(tmp_path_factory.mktemp("unmarkable"), template))


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return stock_tokenizer("chatml", tmp_path_factory.mktemp("chatml"))


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(TURNS, min_size=1, max_size=4))
def test_ids_and_masks_of_a_batch_are_those_of_transformers(tokenizer, batch):
    rows = [{"messages": conversation(turns)} for turns in batch]
    for row, encoded in zip(rows, tokenizer.conversations(rows), strict=True):
        if isinstance(encoded, RowError):
            assert encoded.reason == "mask_not_provable" and "reaches over the border" in encoded.detail
            continue
        expected = tokenizer.hf.apply_chat_template(
            row["messages"],
            chat_template=tokenizer.template.text,
            strftime_now=strftime_now,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert encoded.token_ids.tolist() == expected["input_ids"]
        assert encoded.loss_mask.tolist() == expected["assistant_masks"]


@settings(max_examples=60)
@given(TURNS)
def test_differences_of_renderings_give_the_mask_that_markers_give(chatml, unmarkable, turns):
    assert not unmarkable.template.has_markers
    rows = [{"messages": conversation(turns)}]
    ours, expected = unmarkable.conversations(rows)[0], chatml.conversations(rows)[0]
    if isinstance(expected, RowError):
        assert ours.reason == expected.reason
    else:
        assert ours.token_ids.tolist() == expected.token_ids.tolist()
        assert ours.loss_mask.tolist() == expected.loss_mask.tolist()


def test_a_token_that_reaches_into_the_answer_is_refused(chatml):
    """The newline that opens the turn and the two that begin the answer share a token."""
    found = chatml.conversations([{"messages": [CHAT[0], {"role": "assistant", "content": "\n\nword"}]}])[0]
    assert found.reason == "mask_not_provable"


def test_offsets_that_leave_a_leading_space_out_lose_no_mask(tmp_path):
    """transformers finds no token at such a space and masks the whole conversation out."""
    tokenizer = stock_tokenizer("chatml", tmp_path, trim_offsets=True)
    messages = [CHAT[0], {"role": "assistant", "content": " the answer"}]
    ids, mask = tokenizer.conversation(messages)
    trained = [token for token, weight in zip(ids, mask, strict=True) if weight]
    assert tokenizer.hf.decode(trained) == " the answer<|im_end|>"
    options = {"chat_template": tokenizer.template.text, "return_dict": True, "return_assistant_tokens_mask": True}
    assert tokenizer.hf.apply_chat_template(messages, **options)["input_ids"] == ids


def test_only_the_last_turn_or_each_by_its_weight(chatml):
    chat = [CHAT[0], {**CHAT[1], "weight": 0.5}, CHAT[2], CHAT[3]]
    every = chatml.conversations([{"messages": chat}])[0].loss_mask
    last = chatml.conversations([{"messages": chat}], "last")[0].loss_mask
    weighted = chatml.conversations([{"messages": chat}], "weights")[0].loss_mask
    first = every - last
    assert 0 < last.sum() < every.sum() and set(first.tolist()) == {0.0, 1.0}
    np.testing.assert_array_equal(weighted, 0.5 * first + last)


@pytest.mark.parametrize("weight", [-1, "1", float("nan"), float("inf"), True, [1]])
def test_a_weight_that_is_no_number_from_zero_up_is_refused(weight):
    with pytest.raises(RowError) as caught:
        turn_weights([CHAT[0], {**CHAT[1], "weight": weight}], "weights")
    assert caught.value.reason == "bad_weight"


def test_weights_of_zero_everywhere_train_nothing_and_are_refused(chatml):
    found = chatml.conversations([{"messages": [CHAT[0], {**CHAT[1], "weight": 0}]}], "weights")[0]
    assert found.reason == "no_trained_token"


def test_a_template_that_marks_another_number_of_turns_is_refused_row_by_row(tmp_path):
    """It merges consecutive answers into one turn, which nothing shows until a conversation has them."""
    template = CHATML.replace("{{'<|im_start|>'", "{% if message.role != 'assistant' %}{{'<|im_start|>'").replace(
        "{% endfor %}",
        "{% elif loop.last or messages[loop.index0 + 1].role != 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
        "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% endif %}{% endfor %}",
    )
    tokenizer = BaseHFModelTokenizer(save_tokenizer(tmp_path, template))
    alone, merged = tokenizer.conversations([{"messages": CHAT}, {"messages": [*CHAT, CHAT[3]]}])
    assert isinstance(alone, Encoded) and merged.reason == "mask_not_provable"
