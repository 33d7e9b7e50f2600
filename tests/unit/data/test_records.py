import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.records import Format, check_row, convert, detect
from posttrain.errors import DataError, RowError

USER = {"role": "user", "content": "2+2?"}
RIGHT, WRONG = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"name": "add", "parameters": {"type": "object", "properties": {}}}]

words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).filter(str.strip)
turns = st.lists(st.tuples(words, words), min_size=1, max_size=4)
systems = st.none() | words


def read(record, wanted, **options):
    """What a recipe does with a record that it has not seen before."""
    before = copy.deepcopy(record)
    row = convert(record, detect(record, wanted=wanted).format, wanted=wanted, **options)
    assert record == before, "a record belongs to its source"
    check_row(row, wanted=wanted)
    return row


def conversation(system, pairs):
    messages = [{"role": "system", "content": system}] if system is not None else []
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


@pytest.mark.parametrize(
    ("record", "wanted", "format"),
    [
        ({"messages": [USER, RIGHT], "id": 3}, "conversation", Format.messages),
        ({"prompt": "q", "completion": "a"}, "conversation", Format.prompt_completion),
        ({"conversations": [], "source": "x"}, "conversation", Format.sharegpt),
        ({"instruction": "q", "input": "", "output": "a"}, "conversation", Format.alpaca),
        ({"instruction": "q", "output": "a", "text": "### q"}, "conversation", Format.alpaca),
        ({"prompt": "q", "messages": [], "chosen": [], "rejected": []}, "preference", Format.preference),
        ({"prompt": "q", "messages": [], "chosen": [], "rejected": []}, "conversation", Format.messages),
        ({"chosen": [], "rejected": [], "score": 1.0}, "preference", Format.preference),
        ({"prompt": "q", "completion": "a", "label": True}, "unpaired", Format.unpaired),
        ({"messages": [], "label": False}, "unpaired", Format.unpaired),
        ({"prompt": "q", "completion": "a", "label": 7}, "conversation", Format.prompt_completion),
        ({"prompt": "q", "answer": "4"}, "prompt", Format.prompt),
        ({"question": "q", "answer": "4"}, "prompt", Format.prompt),
        ({"problem": "q", "solution": "4"}, "prompt", Format.prompt),
        ({"prompt": "q", "completion": "a"}, "prompt", Format.prompt_completion),
        ({"messages": [USER], "answer": "4", "label": True}, "prompt", Format.messages),
        ({"text": "once", "messages": None}, "text", Format.text),
        ({"events": [{"type": "click"}], "member": 7}, "events", Format.events),
    ],
)
def test_a_record_is_recognised_by_its_columns(record, wanted, format):
    assert detect(record, wanted=wanted).format is format


def test_a_reading_says_why():
    record = {"instruction": "q", "input": None, "output": "a", "history": []}
    assert detect(record, wanted="conversation").why == "columns instruction, output, history: alpaca"
    assert detect({"text": "x"}, wanted="text").why == "column text: text"


@pytest.mark.parametrize(
    ("record", "wanted", "parts"),
    [
        ({"messages": [], "conversations": []}, "conversation", ["fit messages, sharegpt", "set format:"]),
        ({"prompt": "q", "messages": []}, "prompt", ["fit messages, prompt", "set format:"]),
        (
            {"instruction": "q", "input": ""},
            "conversation",
            ["columns input, instruction", "like alpaca but has no `output`"],
        ),
        ({"chosen": "a", "score": 1}, "preference", ["like preference but has no `rejected`"]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "conversation", ["It looks like preference, prompt"]),
        ({"question": "q", "answer": "4"}, "conversation", ["question without its answer", "`completion`"]),
        ({"text": "once"}, "conversation", ["set format: text"]),
        ({"prompt": "q", "completion": "a", "label": False}, "conversation", ["unpaired", "format: prompt_completion"]),
        ({"kolom": 1}, "conversation", ["columns kolom", "expected one of", "alpaca: instruction, output"]),
        ({}, "text", ["columns (none)"]),
        ({"text": "x"}, "novel", ["wanted is 'novel'", "conversation"]),
    ],
)
@pytest.mark.fault("F31", outcome="REFUSE")
def test_what_cannot_be_recognised_says_what_was_expected_found_and_the_fix(record, wanted, parts):
    with pytest.raises(DataError) as caught:
        detect(record, wanted=wanted)
    assert not isinstance(caught.value, RowError), "a source of the wrong kind is not one bad row"
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_question_with_two_possible_columns_is_not_guessed():
    with pytest.raises(DataError, match="could each be the prompt"):
        convert({"question": "q", "problem": "p"}, Format.prompt, wanted="prompt")
    row = read({"prompt": "q", "question": "kept"}, "prompt")
    assert row == {"messages": [{"role": "user", "content": "q"}], "question": "kept"}


def test_a_format_that_cannot_be_what_is_wanted_is_refused_for_the_whole_source():
    with pytest.raises(DataError, match="format: alpaca cannot be read as preference") as caught:
        convert({"instruction": "q", "output": "a"}, Format.alpaca, wanted="preference")
    assert not isinstance(caught.value, RowError)


def test_text_becomes_a_conversation_only_when_asked():
    row = convert({"text": "once"}, Format.text, wanted="conversation")
    check_row(row, wanted="conversation")
    assert row == {"messages": [{"role": "assistant", "content": "once"}]}


def test_only_the_completion_of_a_prompt_is_trained():
    row = read({"prompt": [USER, WRONG, USER], "completion": [RIGHT]}, "conversation")
    assert [message.get("weight") for message in row["messages"]] == [None, 0, None, None]


def test_what_a_verifier_needs_survives_untouched():
    record = {"prompt": "q", "completion": "a", "ground_truth": [1, None], "meta": {"x": None}, "level": None}
    assert read(record, "prompt") == {
        "messages": [{"role": "user", "content": "q"}],
        "completion": "a",
        "ground_truth": [1, None],
        "meta": {"x": None},
        "level": None,
    }
    pair = {"chosen": None, "rejected": "5", "tools": TOOLS}
    assert read({"prompt": "2+2?", **pair}, "prompt") == {"messages": [USER], **pair}


def test_events_keep_their_other_columns():
    assert read({"events": '[{"type": "click"}]', "member": 7}, "events") == {
        "events": [{"type": "click"}],
        "member": 7,
    }


@pytest.mark.parametrize("label", [True, False])
def test_unpaired_keeps_its_label(label):
    expected = {"messages": [USER, RIGHT], "label": label}
    assert read({"prompt": "2+2?", "completion": "4", "label": label}, "unpaired") == expected
    assert read({"messages": [USER, RIGHT], "label": label, "x": 1}, "unpaired") == expected


def test_pairs_with_and_without_a_prompt_become_the_same_row():
    expected = {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]}
    full = {"chosen": [USER, RIGHT], "rejected": [USER, WRONG]}
    for record in (
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"question": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]},
        {"prompt": json.dumps([USER]), "chosen": json.dumps([RIGHT]), "rejected": json.dumps([WRONG])},
        full,
        {"prompt": "2+2?", "messages": [USER, RIGHT], **full},
        {"prompt": [USER], **full},
    ):
        assert read(record, "preference") == expected
    with_system = {**expected, "prompt": [SYSTEM, USER]}
    assert read({"system": "Be brief.", "prompt": "2+2?", "chosen": "4", "rejected": "5"}, "preference") == with_system
    assert read({"system": "Be brief.", **full}, "preference") == with_system


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": [USER, RIGHT], "rejected": [{"role": "user", "content": "3+3?"}, WRONG]},
        {"chosen": [USER, RIGHT], "rejected": [USER, RIGHT, USER, WRONG]},
        {"chosen": [USER, RIGHT], "rejected": [WRONG]},
        {"prompt": "3+3?", "chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
        {"prompt": [SYSTEM, USER], "chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
        {"prompt": json.dumps([USER, WRONG, USER]), "chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
    ],
)
@pytest.mark.fault("F40", outcome="REFUSE")
def test_a_pair_that_shares_no_prompt_is_refused(record):
    with pytest.raises(RowError) as caught:
        convert(record, Format.preference, wanted="preference")
    assert caught.value.reason == "different_prompts"


@pytest.mark.parametrize("answers", [("4", "4"), ([USER, RIGHT], [USER, RIGHT])])
def test_a_pair_of_one_answer_is_refused(answers):
    with pytest.raises(RowError) as caught:
        read({"prompt": "2+2?", "chosen": answers[0], "rejected": answers[1]}, "preference")
    assert caught.value.reason == "chosen_equals_rejected"


def test_answers_without_a_prompt_are_refused():
    with pytest.raises(RowError, match="prompt") as caught:
        convert({"chosen": "4", "rejected": "5"}, Format.preference, wanted="preference")
    assert caught.value.reason == "wrong_schema"


@given(system=systems, pairs=turns, wanted=st.sampled_from(["conversation", "unpaired", "prompt", "preference"]))
@settings(max_examples=60, deadline=None)
def test_a_canonical_row_converts_to_itself(system, pairs, wanted):
    messages = conversation(system, pairs)
    record = {
        "conversation": {"messages": messages},
        "unpaired": {"messages": messages, "label": True},
        "prompt": {"messages": messages[:-1], "answer": pairs[-1][1]},
        "preference": {
            "prompt": messages[:-1],
            "chosen": messages[-1:],
            "rejected": [{"role": "assistant", "content": pairs[-1][1] + "!"}],
        },
    }[wanted]
    once = read(record, wanted)
    assert once == record
    assert read(once, wanted) == once


ragged = st.fixed_dictionaries(
    {},
    optional={
        name: st.none()
        | st.text(max_size=5)
        | st.integers()
        | st.lists(
            st.dictionaries(
                st.sampled_from(["role", "content", "from", "value", "tool_calls"]),
                st.sampled_from(["user", "assistant", "tool", "gpt", "human", None, 3, [], [{"name": "f"}], "[]"]),
            ),
            max_size=3,
        )
        for name in (
            "messages",
            "prompt",
            "completion",
            "conversations",
            "chosen",
            "rejected",
            "tools",
            "text",
            "label",
        )
    },
)


@given(
    record=ragged,
    format=st.sampled_from(Format),
    wanted=st.sampled_from(["conversation", "preference", "prompt", "text", "unpaired", "events"]),
)
@settings(max_examples=300, deadline=None)
def test_any_record_becomes_a_row_that_converts_to_itself_or_a_named_fault(record, format, wanted):
    try:
        row = convert(record, format, wanted=wanted)
        check_row(row, wanted=wanted)
    except DataError:
        return
    again = Format.messages if "messages" in row and wanted != "unpaired" else format
    assert convert(row, again, wanted=wanted) == row


@given(system=systems, pairs=turns)
@settings(max_examples=60, deadline=None)
def test_sharegpt_and_alpaca_say_the_same_as_messages(system, pairs):
    messages = conversation(system, pairs)
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[message["role"]], "value": message["content"]} for message in messages]
    alpaca = {
        "instruction": pairs[-1][0],
        "output": pairs[-1][1],
        "history": [list(pair) for pair in pairs[:-1]],
        "system": system,
    }
    assert read({"conversations": sharegpt}, "conversation") == {"messages": messages}
    assert read(alpaca, "conversation") == {"messages": messages}
    assert read({**alpaca, "input": "more"}, "conversation")["messages"][-2]["content"] == f"{pairs[-1][0]}\n\nmore"


@given(system=systems, pairs=turns)
@settings(max_examples=30, deadline=None)
def test_conversations_in_from_and_value_are_read_as_trl_reads_them(system, pairs):
    trl = pytest.importorskip("trl.data_utils")
    turns = [{"from": message["role"], "value": message["content"]} for message in conversation(system, pairs)]
    expected = trl.maybe_convert_to_chatml({"conversations": copy.deepcopy(turns)})
    assert trl.is_conversational(expected)
    assert read({"conversations": turns}, "conversation") == expected


@given(system=systems, pairs=turns, answer=words)
@settings(max_examples=30, deadline=None)
def test_the_prompt_of_a_pair_is_the_one_trl_extracts(system, pairs, answer):
    trl = pytest.importorskip("trl.data_utils")
    chosen = conversation(system, pairs)
    rejected = [*chosen[:-1], {"role": "assistant", "content": answer + pairs[-1][1]}]
    record = {"chosen": chosen, "rejected": rejected}
    assert read(record, "preference") == trl.maybe_extract_prompt(copy.deepcopy(record))


def test_a_margin_stays_with_its_pair_and_must_be_a_number():
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert convert(pair | {"margin": 1}, Format.preference, wanted="preference")["margin"] == 1.0
    assert "margin" not in convert(pair | {"margin": None}, Format.preference, wanted="preference")
    for wrong in ("much", True, float("nan")):
        with pytest.raises(RowError, match="margin must be a finite number"):
            convert(pair | {"margin": wrong}, Format.preference, wanted="preference")
