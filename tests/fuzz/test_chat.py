"""Any messages: a RowError that names what is wrong, or tokens that decode to what was said."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import fuzzed
from posttrain.data.records import check_row
from posttrain.data.tokenizer import BaseHFModelTokenizer, Encoded
from posttrain.errors import DataError, RowError
from tiny import tiny_tokenizer

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
roles = st.sampled_from(["user", "assistant", "system", "tool"]) | st.text(max_size=6)
messages = st.lists(
    st.fixed_dictionaries({"role": roles, "content": st.text(max_size=20)}, optional={"weight": anything}), max_size=5
)
hostile = st.lists(st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "x"]), anything), max_size=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BaseHFModelTokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@fuzzed
@given(rows=st.lists(messages | hostile, min_size=1, max_size=3), train_on=st.sampled_from(["all", "last", "weights"]))
@pytest.mark.fault("F32", outcome="REFUSE")
def test_any_conversation(tokenizer: BaseHFModelTokenizer, rows: list[Any], train_on: Any):
    found = tokenizer.conversations([{"messages": row} for row in rows], train_on)
    assert len(found) == len(rows)
    for row, each in zip(rows, found, strict=True):
        if isinstance(each, RowError):
            assert each.reason and str(each)
            continue
        assert isinstance(each, Encoded) and len(each.token_ids) == len(each.loss_mask)
        assert np.isfinite(each.loss_mask).all() and (each.loss_mask >= 0).all()
        text = tokenizer.hf.decode(each.token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert all(message["content"].strip() in text for message in row if isinstance(message["content"], str))


@fuzzed
@given(row=messages | hostile)
def test_any_prompt(tokenizer: BaseHFModelTokenizer, row: list[Any]):
    if not row:
        row = [{"role": "user", "content": ""}]
    try:
        assert all(isinstance(token, int) for token in tokenizer.prompt(row))
    except RowError as error:
        assert error.reason and str(error)


@fuzzed
@given(row=st.dictionaries(st.sampled_from(["messages", "prompt", "chosen", "rejected", "label", "text"]), anything))
def test_any_row_is_checked(row: dict[str, Any]):
    for wanted in ("conversation", "preference", "prompt", "text", "unpaired"):
        try:
            check_row(row, wanted=wanted)
        except DataError as error:
            assert str(error)


PARTS = [
    "{%",
    "%}",
    "{{",
    "}}",
    "messages",
    "message",
    "['role']",
    ".content",
    "for m in",
    "endfor",
    "if",
    "endif",
    "|",
    "+",
]


@fuzzed
@given(template=st.lists(st.sampled_from(PARTS) | st.text(max_size=5), max_size=12).map(" ".join))
@pytest.mark.fault("F20", outcome="REFUSE")
def test_any_template(tokenizer: BaseHFModelTokenizer, template: str):
    from posttrain.data.chat_template import ChatTemplate

    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text, spans = ChatTemplate(template, {}).render(said)
    except RowError as error:
        assert error.reason == "template_refused"
        return
    assert all(0 <= start <= end <= len(text) for start, end in spans)


def test_a_template_that_is_nested_without_end_is_refused(tmp_path: Path):
    from posttrain.data.chat_template import ChatTemplate

    for template in (
        "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 // 0 }}",
    ):
        with pytest.raises(RowError):
            ChatTemplate(template, {}).render([{"role": "user", "content": "a"}])
