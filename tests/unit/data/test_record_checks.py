import json
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.record_checks import question_hash, row_hash
from posttrain.data.records import Format, check_row, convert, question_key, row_key
from posttrain.errors import RowError

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM, RESULT = {"role": "system", "content": "Be brief."}, {"role": "tool", "content": "4"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 2}}]}


def message(role="user", **fields):
    return {"role": role, **fields}


def fault(messages, wanted="conversation", **columns):
    """The fault of a record of messages, on its way to a checked row."""
    with pytest.raises(RowError) as caught:
        row = convert({"messages": messages, **columns}, DIRECT[wanted], wanted=wanted)
        check_row(row, wanted=wanted)
    assert "\n" not in str(caught.value)
    return caught.value


DIRECT = {"conversation": Format.messages, "prompt": Format.messages, "unpaired": Format.unpaired}


@pytest.mark.parametrize(
    ("messages", "reason", "says"),
    [
        ([], "empty_messages", "messages"),
        ("not json", "wrong_schema", "not JSON"),
        (7, "wrong_schema", "7"),
        (["hello"], "wrong_schema", "messages[0] must be a mapping"),
        ([{"content": "hi"}, ANSWER], "wrong_schema", "messages[0].role must be a string, got None"),
        ([message(content=7), ANSWER], "wrong_schema", "messages[0].content must be a string, got 7"),
        ([message(content={"a": 1}), ANSWER], "wrong_schema", "messages[0].content"),
        ([message(content=None), ANSWER], "null_content", "messages[0]"),
        ([message(), ANSWER], "null_content", "messages[0]"),
        ([USER, message("assistant", content=None, tool_calls=[])], "null_content", "messages[1]"),
        ([USER], "no_assistant_turn", "user"),
        ([USER, CALL, RESULT], "no_assistant_turn", "user, assistant, tool"),
        ([USER, message("assistant", content=" \n")], "empty_assistant", "messages[1]"),
        ([message(content="\t"), ANSWER], "empty_prompt", "messages[0]"),
        ([USER, message("bot", content="4")], "unknown_role", 'messages[1].role is "bot"; known roles: system'),
        ([message("human", content="2+2?"), ANSWER], "unknown_role", "Fix: role_map: {human: user}"),
        ([{"from": "narrator", "value": "x"}], "unknown_role", 'messages[0].from is "narrator"'),
        ([message(content=[{"type": "image_url"}]), ANSWER], "unsupported_content", "content[0] is 'image_url'"),
        ([message(content=["2+2?"]), ANSWER], "unsupported_content", "content[0] is 'str'"),
        ([USER, SYSTEM, ANSWER], "wrong_role_order", "messages[1] is a system turn after a user turn"),
        ([SYSTEM, SYSTEM, USER, ANSWER], "wrong_role_order", "messages[1]"),
        ([USER, USER, ANSWER], "wrong_role_order", "messages[1] is a user turn after a user turn"),
        ([USER, ANSWER, ANSWER], "wrong_role_order", "messages[2]"),
        ([USER, ANSWER, RESULT, ANSWER], "wrong_role_order", "messages[2] is a tool turn"),
        ([RESULT, ANSWER], "wrong_role_order", "after nothing"),
        ([message(content="a\0b"), ANSWER], "not_text", "messages[0].content, character 1 is a NUL character (0x0000)"),
        ([message(content="é\ud800"), ANSWER], "not_text", "messages[0].content, character 1 is half"),
        ([USER, message("assistant", content="4", reasoning_content="\udfff")], "not_text", "0xdfff"),
        ([USER, message("assistant", content="4", reasoning_content=4)], "wrong_schema", "reasoning_content"),
        ([USER, message("assistant", content="4", weight=True)], "wrong_schema", "weight"),
        ([USER, message("assistant", content="4", weight=float("nan"))], "wrong_schema", "weight"),
        ([USER, message("assistant", content="4", weight=-1)], "wrong_schema", "weight"),
        ([USER, message("assistant", content="4", weight=float("inf"))], "wrong_schema", "weight"),
        ([USER, message("assistant", content="4", weight=1e39)], "wrong_schema", "from 0 to 16777216, got 1e+39"),
        ([USER, message("assistant", content="4", weight=10**400)], "wrong_schema", "weight"),
        ([USER, message("assistant", content="", tool_calls=[{"id": "1"}])], "wrong_schema", "names no function"),
        (
            [USER, message("assistant", tool_calls=[{"name": "f", "arguments": "[1]"}])],
            "wrong_schema",
            "arguments must be a mapping",
        ),
        ([USER, message("assistant", tool_calls=[{"name": "f", "arguments": "{"}])], "wrong_schema", "not JSON"),
        ([{**CALL, "role": "user", "content": "2+2?"}, ANSWER], "wrong_schema", "tool_calls stands on a user turn"),
        (
            [USER, message("assistant", tool_calls=[{"name": "f", "arguments": {"a": "\0"}}])],
            "not_text",
            "messages[1].tool_calls[0].arguments.a, character 0",
        ),
    ],
)
@pytest.mark.fault("F32", outcome="REFUSE")
def test_each_fault_of_a_conversation_has_a_reason_and_says_where(messages, reason, says):
    caught = fault(messages)
    assert (caught.reason, says in str(caught)) == (reason, True), str(caught)


@pytest.mark.parametrize(
    "messages",
    [
        [ANSWER],
        [SYSTEM, {"role": "developer", "content": "d"}, USER, ANSWER],
        [USER, CALL, RESULT, RESULT, ANSWER],
        [USER, CALL],
        [USER, CALL, RESULT, CALL, RESULT, ANSWER, USER, ANSWER],
        [USER, message("assistant", content="<tool_call>\n{}\n</tool_call>"), RESULT, ANSWER],
        [message("system", content=""), USER, CALL, message("tool", content=""), ANSWER],
        [
            message(content="naïve 👍🏽\ufeff\u200b"),
            message("assistant", content="4", weight=0.5, reasoning_content=""),
        ],
    ],
)
def test_sound_conversations_pass(messages):
    row = convert({"messages": messages}, Format.messages, wanted="conversation")
    check_row(row, wanted="conversation")
    assert row["messages"] == messages


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([USER, ANSWER], "prompt_ends_with_answer"),
        ([SYSTEM], "empty_prompt"),
        ([message(content=" ")], "empty_prompt"),
        ([], "empty_messages"),
    ],
)
def test_a_prompt_ends_where_the_assistant_is_to_speak(messages, reason):
    assert fault(messages, "prompt").reason == reason


def test_a_prompt_may_end_with_a_result():
    check_row({"messages": [USER, CALL, RESULT]}, wanted="prompt")


@pytest.mark.parametrize("label", [None, 1, "true", 0.0])
def test_a_label_is_true_or_false(label):
    assert fault([USER, ANSWER], "unpaired", label=label).reason == "bad_label"


@pytest.mark.parametrize("tools", [7, "not json", ["x"], [7], {"name": "f"}])
def test_tools_are_a_list_of_mappings(tools):
    assert fault([USER, ANSWER], tools=tools).reason == "wrong_schema"


def test_text_of_tools_is_checked():
    assert fault([USER, ANSWER], tools=[{"name": "f", "description": "\0"}]).reason == "not_text"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rejected": [ANSWER]}, "chosen_equals_rejected"),
        ({"prompt": []}, "empty_prompt"),
        ({"prompt": [SYSTEM]}, "empty_prompt"),
        ({"prompt": [USER, ANSWER]}, "prompt_ends_with_answer"),
        ({"prompt": "2+2?"}, "wrong_schema"),
        ({"chosen": []}, "empty_messages"),
        ({"chosen": [CALL, RESULT]}, "no_assistant_turn"),
        ({"chosen": [USER, ANSWER]}, "wrong_role_order"),
        ({"prompt": [USER, CALL, RESULT], "chosen": [USER, ANSWER]}, "different_prompts"),
        ({"rejected": [{"role": "assistant", "content": " "}]}, "empty_assistant"),
        ({"rejected": None}, "wrong_schema"),
    ],
)
@pytest.mark.fault("F40", outcome="REFUSE")
def test_each_fault_of_a_pair_has_a_reason(changes, reason):
    row = {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "5"}]}
    check_row(row, wanted="preference")
    with pytest.raises(RowError) as caught:
        check_row({**row, **changes}, wanted="preference")
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("row", "wanted", "reason"),
    [
        ({"text": 7}, "text", "wrong_schema"),
        ({"text": "\n"}, "text", "empty_text"),
        ({"text": "a\0"}, "text", "not_text"),
        ({"events": {}}, "events", "wrong_schema"),
        ({"events": [1]}, "events", "wrong_schema"),
        ({"events": []}, "events", "empty_events"),
        ({"events": [{"page": "\ud800"}]}, "events", "not_text"),
        ({}, "conversation", "wrong_schema"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "conversation", "unknown_role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "conversation", "unknown_role"),
        ({"messages": [{"role": "user", "content": 3}]}, "conversation", "wrong_schema"),
        ({"messages": ["x"]}, "conversation", "wrong_schema"),
        ({"messages": [USER, {**ANSWER, "tool_calls": ["x"]}]}, "conversation", "wrong_schema"),
        ({"messages": [USER, ANSWER], "tools": "[]"}, "conversation", "wrong_schema"),
    ],
)
def test_rows_made_by_hand_are_checked_too(row, wanted, reason):
    with pytest.raises(RowError) as caught:
        check_row(row, wanted=wanted)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("column", "value", "format", "wanted"),
    [
        ("output", 7, Format.alpaca, "conversation"),
        ("input", 7, Format.alpaca, "conversation"),
        ("history", ["x"], Format.alpaca, "conversation"),
        ("system", {}, Format.alpaca, "conversation"),
        ("instruction", None, Format.alpaca, "conversation"),
        ("completion", 7, Format.prompt_completion, "conversation"),
        ("prompt", 7, Format.prompt, "prompt"),
        ("text", 7, Format.text, "text"),
    ],
)
@pytest.mark.fault("F31", outcome="REFUSE")
def test_a_column_of_the_wrong_type_is_named(column, value, format, wanted):
    record = {"instruction": "q", "output": "a", "prompt": "q", "completion": "a", column: value}
    with pytest.raises(RowError, match=column) as caught:
        convert(record, format, wanted=wanted)
    assert caught.value.reason == "wrong_schema"


def test_what_is_not_a_record_is_refused():
    with pytest.raises(RowError) as caught:
        convert(["x"], Format.messages, wanted="conversation")  # type: ignore[arg-type]
    assert caught.value.reason == "not_a_record"


def test_a_demonstration_asks_what_its_prompt_asks():
    spaced = {"role": "user", "content": "  2+2?\n"}
    keys = {
        question_key({"messages": [USER]}),
        question_key({"messages": [USER, ANSWER]}),
        question_key({"messages": [spaced, ANSWER], "tools": [{}], "label": True}),
        question_key({"prompt": [USER], "chosen": [ANSWER], "rejected": [CALL]}),
    }
    assert len(keys) == 1


def test_different_questions_have_different_keys():
    rows = [
        {"messages": [USER]},
        {"messages": [SYSTEM, USER]},
        {"messages": [USER, ANSWER, USER]},
        {"messages": [USER, CALL, RESULT]},
        {"messages": [USER, {**CALL, "tool_calls": [{"name": "add", "arguments": {"a": 3}}]}, RESULT]},
        {"messages": [{"role": "user", "content": "Be brief.\nuser: 2+2?"}]},
        {"text": "2+2?"},
        {"events": [{"a": 1}]},
    ]
    assert len({question_key(row) for row in rows}) == len(rows)


def test_a_row_key_forgets_the_order_of_columns_and_nothing_else():
    assert row_key({"messages": [USER], "a": 1}) == row_key({"a": 1, "messages": [dict(reversed(USER.items()))]})
    assert row_key({"text": "a b"}) != row_key({"text": "a  b"})
    with pytest.raises(RowError, match="bytes"):
        row_key({"messages": [USER], "image": b"x"})


@given(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text())))
def test_a_row_key_is_the_row(row):
    assert json.loads(row_key(row)) == row


def test_a_question_hash_is_16_bytes_of_the_sha256_of_its_key():
    row = {"messages": [SYSTEM, USER, ANSWER]}
    assert question_hash(row) == sha256(b"system: Be brief.\nuser: 2+2?").digest()[:16]


def test_a_row_hash_fits_a_uint64_and_is_equal_for_exact_duplicates_alone():
    rows = [{"messages": [USER, ANSWER], "id": 1}, {"id": 1, "messages": [USER, ANSWER]}, {"messages": [USER, ANSWER]}]
    hashes = np.array([row_hash(row) for row in rows], np.uint64)
    assert hashes[0] == hashes[1] != hashes[2]
    assert int(hashes[2]) == int.from_bytes(sha256(row_key(rows[2]).encode()).digest()[:8], "little")


def test_a_hash_survives_text_that_is_no_utf8_in_a_column_of_the_users_own():
    assert row_hash({"messages": [USER], "note": "\ud800"}) != row_hash({"messages": [USER], "note": "\ud801"})


def test_a_row_nested_without_end_has_no_key():
    deep: object = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(RowError, match="keep to strings"):
        row_key({"messages": [USER], "meta": deep})
