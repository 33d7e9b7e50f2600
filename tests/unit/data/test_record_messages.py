import copy
import json

from posttrain.data.records import Format, check_row, convert, detect

SYSTEM = {"role": "system", "content": "Be brief."}
USER, RIGHT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}]


def read(record, **options):
    """The checked conversation of a record that was not seen before."""
    row = convert(record, detect(record, wanted="conversation").format, wanted="conversation", **options)
    check_row(row, wanted="conversation")
    return row


def test_tool_use_in_sharegpt_becomes_calls_and_results():
    row = read(
        {
            "conversations": [
                {"from": "human", "value": "2+2?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "It is 4.", "weight": 1},
            ],
            "system": "Be brief.",
            "tools": json.dumps(TOOLS),
        },
    )
    assert row == {
        "messages": [
            SYSTEM,
            USER,
            {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 2}}]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "It is 4.", "weight": 1},
        ],
        "tools": TOOLS,
    }


def test_a_role_map_comes_before_the_known_names():
    record = {"messages": [USER, {"role": "bot", "content": "4"}]}
    assert read(record, role_map={"bot": "assistant"}) == {"messages": [USER, RIGHT]}
    record = {"messages": [{**USER, "role": "assistant"}, {**RIGHT, "role": "user"}]}
    assert read(record, role_map={"user": "assistant", "assistant": "user"}) == {"messages": [USER, RIGHT]}
    record = {"conversations": [{"from": "chatgpt", "value": "4"}]}
    assert read(record, role_map={"chatgpt": "gpt"}) == {"messages": [RIGHT]}


def test_columns_that_parquet_holds_as_json_text_are_parsed():
    row = read({"messages": json.dumps([USER, RIGHT]), "tools": [json.dumps(TOOLS[0])]})
    assert row == {"messages": [USER, RIGHT], "tools": TOOLS}
    for text in ('[1, 2] has which "role"?', '["role"]'):
        row = read({"prompt": text, "completion": "4"})
        assert row["messages"][0] == {"role": "user", "content": text}


def test_calls_of_any_spelling_become_mappings():
    stored = {"type": "function", "id": None, "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
    for calls in ([CALL], json.dumps([CALL]), [stored], [json.dumps(CALL)]):
        asked = {"role": "assistant", "content": None, "tool_calls": calls, "name": None}
        row = read({"messages": [USER, asked, {"role": "tool", "content": "4"}, RIGHT]})
        assert row["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    row = read({"messages": [USER, {**RIGHT, "tool_calls": []}], "tools": []})
    assert row == {"messages": [USER, RIGHT]}


def test_what_parquet_unions_into_tools_and_calls_is_left_out():
    tools = copy.deepcopy(TOOLS)
    tools[0]["function"]["parameters"]["properties"]["city"] = None
    call = {"name": "add", "arguments": {"a": None, "city": None}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    row = read({"messages": [USER, asked], "tools": tools})
    assert row["tools"] == TOOLS
    assert row["messages"][1]["tool_calls"][0]["arguments"] == {"a": None}, "a declared argument may be null"
    pair = {"prompt": [USER], "chosen": [asked], "rejected": [RIGHT], "tools": tools}
    assert convert(pair, Format.preference, wanted="preference")["chosen"] == row["messages"][1:]


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "2+", "image_url": None}, {"type": "text", "text": "2?"}]
    assert read({"messages": [{"role": "user", "content": parts}, RIGHT]})["messages"][0] == USER
