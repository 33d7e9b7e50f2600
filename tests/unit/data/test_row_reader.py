"""A source's records become rows one by one: what is unfit is a row's fault, a leaked question is the run's."""

import json
from datetime import date
from hashlib import sha256

import pytest

from posttrain.data.record_checks import question_hash, row_hash
from posttrain.data.records import Format
from posttrain.data.row_reader import RowReader
from posttrain.data.source import read_rows
from posttrain.errors import DataError, RowError

USER, RIGHT, WRONG = ({"role": r, "content": c} for r, c in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5")))
HELD_OUT = frozenset({question_hash({"messages": [USER]})})


def fault(record, **options):
    with pytest.raises(RowError) as caught:
        RowReader(**{"wanted": "conversation", **options})(record)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"kolom": 1}, "no conversation in columns kolom; expected one of (messages: messages; "),
        ({"instruction": "q"}, "It looks like alpaca but has no `output`"),
        ({"messages": None}, "columns (none)"),
        ({"messages": [USER, RIGHT], "conversations": []}, "fit messages, sharegpt. Fix: set format:"),
        ({"messages": [USER, RIGHT], "label": False}, "`label` says which answers are bad"),
    ],
)
def test_columns_that_fit_no_format_or_several_are_the_fault_of_the_row(record, says):
    error = fault(record)
    assert error.reason == "unknown_format"
    assert says in error.detail


def test_one_row_of_other_columns_does_not_spoil_those_around_it():
    read, found = RowReader(wanted="conversation"), []
    for record in ({"messages": [USER, RIGHT]}, {"kolom": 1}, {"instruction": "2+2?", "output": "4"}, {"kolom": 2}):
        try:
            found.append(read(record)["messages"])
        except RowError as error:
            found.append(error.reason)
    assert found == [[USER, RIGHT], "unknown_format", [USER, RIGHT], "unknown_format"]


def test_a_text_label_seen_before_does_not_let_bad_answers_through():
    read = RowReader(wanted="conversation")
    assert read({"messages": [USER, RIGHT], "label": "maths"})["messages"] == [USER, RIGHT]
    with pytest.raises(RowError, match="`label` says which answers are bad"):
        read({"messages": [USER, WRONG], "label": False})


def test_a_format_that_is_named_is_not_looked_up():
    record = {"messages": [USER, RIGHT], "conversations": [], "label": True}
    assert RowReader(wanted="conversation", format=Format.messages)(record) == {"messages": [USER, RIGHT]}


def test_roles_are_mapped():
    record = {"messages": [USER, {**RIGHT, "role": "bot"}]}
    assert fault(record).reason == "unknown_role"
    assert RowReader(wanted="conversation", role_map={"bot": "assistant"})(record)["messages"] == [USER, RIGHT]


@pytest.mark.parametrize("record", [7, ["x"], None, "text"])
def test_what_is_no_record_is_a_bad_row(record):
    assert fault(record).reason == "not_a_record"


def test_the_error_of_a_line_that_could_not_be_read_is_passed_on():
    assert fault(RowError("not_json", "cut short")).reason == "not_json"


def test_names_from_the_data_cannot_break_a_message_into_lines_or_make_it_endless():
    reader = {"messages": [USER, {**RIGHT, "role": "a\nb"}]}
    assert 'messages[1].role is "a\\nb"; ' in str(fault(reader)) and 'role_map: {"a\\nb": assistant}' in str(
        fault(reader)
    )
    assert "columns 'a\\nb'; expected" in str(fault({"a\nb": 1}))
    assert len(str(fault({f"column_{n}": n for n in range(10_000)}))) < 1000


@pytest.mark.parametrize("value", [b"x", date(2026, 1, 1), {"a": [b"x"]}])
@pytest.mark.parametrize("place", ["tool_calls", "tools", "events"])
@pytest.mark.fault("F30", outcome="REFUSE")
def test_values_that_json_cannot_hold_are_named_by_their_place(value, place):
    call = {"role": "assistant", "content": "4", "tool_calls": [{"name": "f", "arguments": {"when": value}}]}
    record = {
        "tool_calls": {"messages": [USER, call]},
        "tools": {"messages": [USER, RIGHT], "tools": [{"name": "f", "when": value}]},
        "events": {"events": [{"when": value}]},
    }[place]
    wanted = "events" if place == "events" else "conversation"
    error = fault(record, wanted=wanted)
    assert error.reason == "wrong_schema" and f"{place}[0]" in str(error) and "keep to strings" in str(error)


def test_columns_beside_events_may_have_any_name():
    record = {"events": [{"page": 1}], "prompt": "[1]", "messages": 7, "text": None}
    row = RowReader(wanted="events", held_out=HELD_OUT)(record)
    assert question_hash(row) == question_hash({"events": [{"page": 1}]}) and row_hash(row) > 0


def test_columns_nested_without_end_are_a_bad_row():
    deep: object = "x"
    for _ in range(5000):
        deep = [deep]
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": deep}}]}
    assert fault({"messages": [USER, call]}).reason == "wrong_schema"


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"messages": [{"role": "user", "content": " 2+2?\n"}, WRONG]}, "conversation"),
        ({"instruction": "2+2?", "output": "4"}, "conversation"),
        ({"prompt": "2+2?", "answer": "4"}, "prompt"),
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "preference"),
    ],
)
@pytest.mark.fault("F39", outcome="REFUSE")
def test_a_held_out_question_is_refused_whatever_its_format_and_costs_no_budget(record, wanted):
    RowReader(wanted=wanted)(record)
    with pytest.raises(DataError) as caught:
        RowReader(wanted=wanted, held_out=HELD_OUT)(record)
    assert not isinstance(caught.value, RowError), "no budget of bad rows allows a leak"
    assert str(caught.value).startswith("repeats a held-out question, 'user: 2+2?'; ")
    assert "Fix: " in str(caught.value)


def test_other_questions_pass_beside_held_out_ones():
    read = RowReader(wanted="conversation", held_out=HELD_OUT)
    longer = [USER, RIGHT, {"role": "user", "content": "2+3?"}, WRONG]
    assert read({"messages": longer})["messages"] == longer


def test_a_long_leaked_question_is_shown_by_its_beginning():
    record = {"prompt": "why " * 1000}
    held_out = frozenset({question_hash(RowReader(wanted="prompt")(record))})
    with pytest.raises(DataError) as caught:
        RowReader(wanted="prompt", held_out=held_out)(record)
    assert "why why" in str(caught.value) and len(str(caught.value)) < 400


def test_a_row_of_no_known_format_is_named_by_file_and_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q"}) + '\n{"kolom": 1}\n')
    with pytest.raises(DataError, match=rf"^data\.prompts: {tmp_path}/rows\.jsonl:2: no prompt in columns kolom"):
        read_rows(str(tmp_path / "rows.jsonl"), key="data.prompts", seed=0, wanted="prompt")


def test_a_hash_is_that_of_the_question():
    assert question_hash({"messages": [USER, RIGHT]}) == sha256(b"user: 2+2?").digest()[:16]
