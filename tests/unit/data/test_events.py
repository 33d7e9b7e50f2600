import json
from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.data.encode import Encoder
from posttrain.data.event_schema import EventSchema, Field
from posttrain.data.event_world import World
from posttrain.data.event_world_rows import schema as world_schema
from posttrain.data.events import check_events, event_tables, question, read_events, rows
from posttrain.data.item_tokens import PlainItems
from posttrain.data.row_reader import RowReader
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.train_tokenizer import word_tokenizer
from posttrain.data.turn_numbers import Numbers
from posttrain.errors import DataError, RowError

NOON = datetime(2025, 3, 3, 12)  # a Monday


def make_schema(**changes) -> EventSchema:
    fields = {
        "items": PlainItems(range(9)),
        "context": (Field(column="device", values=("tv", "phone")),),
        "outcome": (Field(column="action", values=("finish", "skip")),),
        "trained": {"action": ("finish",)},
    }
    return EventSchema(**fields | changes)


def table(*events, **columns) -> pa.Table:
    """Of (member, minutes after noon, item, action)."""
    members, minutes, items, actions = zip(*events, strict=True)
    times = pa.array([NOON + timedelta(minutes=each) for each in minutes], pa.timestamp("us"))
    found = {"member": members, "time": times, "item": items, "action": actions, "device": ["tv"] * len(events)}
    return pa.table(found | columns)


def contents(row) -> list[str]:
    return [message["content"] for message in row["messages"]]


def weights(row) -> list[int]:
    return [message["weight"] for message in row["messages"] if message["role"] == "assistant"]


def test_a_member_is_a_conversation_in_the_order_of_time():
    events = table((2, 5, 4, "finish"), (1, 9, 3, "finish"), (1, 0, 1, "finish"), (1, 300, 2, "finish"))
    first, second = rows(events, make_schema())
    assert contents(first) == [
        "<session><device_tv>",
        "<item_1>",
        "<action_finish><next><device_tv>",
        "<item_3>",
        "<action_finish><session><device_tv>",
        "<item_2>",
    ]
    assert (first["member"], first["items"], first["asked"]) == (1, [1, 3, 2], [0, 1, 2])
    assert second["member"] == 2 and contents(second) == ["<session><device_tv>", "<item_4>"]


def test_only_chosen_events_are_trained_and_nothing_is_read_after_the_last_of_them():
    (row,) = rows(table((1, 0, 1, "skip"), (1, 1, 2, "finish"), (1, 2, 3, "skip")), make_schema())
    assert weights(row) == [0, 1] and row["asked"] == [1]
    assert list(rows(table((1, 0, 1, "skip")), make_schema())) == []


def test_a_trained_outcome_is_part_of_the_answer():
    (row,) = rows(table((1, 0, 1, "finish"), (1, 1, 2, "finish")), make_schema(train_outcome=True))
    assert contents(row)[1:3] == ["<item_1><action_finish>", "<next><device_tv>"]


def test_no_event_of_the_cutoff_or_later_is_in_training_and_each_later_one_is_asked_once():
    """Of a whole world: the items carry their time, as every event gets an item of its own."""
    events = World(1, members=30, items=40).events()
    cutoff = World(1, members=30, items=40).cutoff
    numbered = events.set_column(2, "item", pa.array(range(events.num_rows)))
    schema = world_schema(PlainItems(range(events.num_rows)))
    checked = check_events(numbered, schema, where="world")
    times, actions = events["time"].to_pylist(), events["action"].to_pylist()
    read = [item for row in rows(checked, schema, before=cutoff) for item in row["items"]]
    assert read and max(times[item] for item in read) < cutoff
    late = list(rows(checked, schema, after=cutoff))
    asked = [row["items"][place] for row in late for place in row["asked"]]
    assert sorted(asked) == [
        number
        for number, (time, action) in enumerate(zip(times, actions, strict=True))
        if time >= cutoff and action != "skip"
    ]
    trained = [i for row in late for i, weight in zip(row["items"], weights(row), strict=True) if weight]
    assert trained == asked and any(len(row["items"]) > len(row["asked"]) for row in late)


@pytest.mark.parametrize("most", [2, 5, 8, 64])
def test_a_long_history_becomes_rows_that_ask_each_event_once_with_half_a_row_before_it(most):
    minutes = np.cumsum(np.random.default_rng(most).choice([5, 400], 30)).tolist()
    events = table(*[(1, minute, number % 9, "finish") for number, minute in enumerate(minutes)])
    found = list(rows(events, make_schema(max_events=most)))
    assert sum(len(row["asked"]) for row in found) == 30
    assert all(len(row["items"]) <= most and row["asked"][-1] == len(row["items"]) - 1 for row in found)
    assert all(contents(row)[0].startswith("<session>") or row["asked"][0] == 0 for row in found[:1])


def test_an_item_without_a_name_is_read_and_never_trained():
    events = table((1, 0, 77, "finish"), (1, 1, 2, "finish"))
    (row,) = rows(events, make_schema())
    assert contents(row)[1] == "<other_item>" and weights(row) == [0, 1] and row["asked"] == [0, 1]
    alone = table((1, 0, 77, "finish"))
    assert list(rows(alone, make_schema())) == []
    assert [row["asked"] for row in rows(alone, make_schema(), unnamed=True)] == [[0]]


def test_time_gives_the_hour_the_weekday_and_the_pause():
    context = (
        Field(column="hour", edges=(6, 12)),
        Field(column="weekday", edges=(1, 5)),
        Field(column="gap_minutes", edges=(10, 100)),
    )
    events = table((1, 0, 1, "finish"), (1, 9, 2, "finish"), (1, -24 * 60 - 1, 3, "finish"))
    (row,) = rows(events, make_schema(context=context, outcome=()))
    assert contents(row)[::2] == [
        "<session><hour_1><weekday_2><gap_minutes_2>",  # 11:59 of the Sunday before
        "<session><hour_2><weekday_0><gap_minutes_2>",
        "<next><hour_2><weekday_0><gap_minutes_0>",
    ]


def test_zoned_times_are_read_as_utc():
    zoned = pa.array([datetime(2025, 3, 3, 12)], pa.timestamp("ms", tz="America/New_York"))
    events = table((1, 0, 1, "finish")).set_column(1, "time", zoned)
    assert check_events(events, make_schema(), where="x")["time"].to_pylist() == [datetime(2025, 3, 3, 12)]


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("time", ["a", "b"], "column time is string, not a timestamp. Fix: cast"),
        ("item", ["a", "b"], "column item is string, not an integer. Fix: cast or number it"),
        ("member", [1, None], "row 1: member is null. Fix: fill it, or drop the row"),
        ("device", ["tv", "radio"], "row 1: device 'radio' is none of tv, phone. Fix: mend or drop the row, or add"),
        ("device", ["tv", None], "row 1: device is null"),
    ],
)
def test_a_bad_row_is_refused_with_its_file_its_row_and_what_to_do(tmp_path, column, values, said):
    events = table((1, 0, 1, "finish"), (1, 1, 2, "finish"))
    place = events.column_names.index(column)
    pq.write_table(events.set_column(place, column, pa.array(values)), tmp_path / "bad.parquet")
    with pytest.raises(DataError) as error:
        read_events(str(tmp_path), make_schema())
    assert f"{tmp_path}/bad.parquet" in str(error.value) and said in str(error.value)


def test_a_number_that_is_none_is_refused():
    minutes = make_schema(outcome=(Field(column="minutes", edges=(1.0, 10.0)),))
    events = table((1, 0, 1, "finish"), (1, 1, 2, "finish"), minutes=[3.0, float("nan")])
    with pytest.raises(DataError, match="row 1: minutes nan is no number"):
        check_events(events, minutes, where="x")


def test_a_file_without_a_column_is_refused_and_one_that_is_no_parquet(tmp_path):
    pq.write_table(table((1, 0, 1, "finish")).drop_columns(["device"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column device; it has member, time, item, action\. Fix: rename"):
        read_events(str(tmp_path / "a.parquet"), make_schema())
    (tmp_path / "b.parquet").write_bytes(b"nonsense" * 9)
    with pytest.raises(DataError, match="no sound Parquet"):
        read_events(str(tmp_path / "b.parquet"), make_schema())


@pytest.mark.parametrize("wrong", [{"edges": (2, 1)}, {}, {"values": ("a",), "edges": (1,)}])
def test_a_field_is_a_category_or_a_number(wrong):
    with pytest.raises(DataError, match="field x"):
        Field(column="x", **wrong)


def test_files_are_read_one_by_one_or_as_one_table_whatever_their_order(tmp_path):
    pq.write_table(table((1, 9, 2, "finish")), tmp_path / "a.parquet")
    pq.write_table(table((1, 0, 1, "finish")), tmp_path / "b.parquet")
    (row,) = rows(read_events(f"{tmp_path}/*.parquet", make_schema()), make_schema())
    assert row["items"] == [1, 2]
    assert [each.num_rows for each in event_tables(str(tmp_path), make_schema())] == [1, 1]


def test_events_are_read_from_s3(s3_bucket, tmp_path):
    from posttrain import storage

    pq.write_table(table((1, 0, 1, "finish")), tmp_path / "a.parquet")
    storage.write_bytes(f"{s3_bucket}/events/a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert read_events(f"{s3_bucket}/events/", make_schema()).num_rows == 1


@pytest.fixture
def tokenizer(tmp_path):
    word_tokenizer(make_schema().vocabulary, tmp_path)
    return BaseHFModelTokenizer(tmp_path)


def test_a_row_survives_the_data_engine_and_only_chosen_items_and_their_end_carry_loss(tokenizer):
    events = table((1, 0, 1, "finish"), (1, 1, 2, "skip"), (1, 2, 3, "finish"))
    (row,) = rows(events, make_schema())
    read = RowReader(wanted="conversation")(json.loads(json.dumps(row)))
    (units,) = Encoder(tokenizer, wanted="conversation", pack_tokens=64, prove=1)([read])
    assert not isinstance(units, RowError)
    ((sample,),) = units
    words = tokenizer.hf.convert_ids_to_tokens(sample.target_ids[sample.loss_mask > 0].tolist())
    assert words == ["<item_1>", "<|end|>", "<item_3>", "<|end|>"]
    assert len(sample) + 1 == 3 * 4 + 2  # <session>/<next>, device, item, end; and two outcomes: no other token


def test_a_question_is_the_beginning_of_its_conversation(tokenizer):
    (row,) = rows(table((1, 0, 1, "finish"), (1, 1, 2, "finish")), make_schema())
    asked = question(row)
    whole, _ = tokenizer.conversation(row["messages"])
    assert tokenizer.prompt(asked["messages"]) == whole[:-2] and asked["item"] == 2


def test_transformers_opens_the_tokenizer_and_writes_a_word_a_token(tokenizer):
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(tokenizer.folder)
    ids = opened("<item_3><item_1> <device_tv>")["input_ids"]
    assert opened.convert_ids_to_tokens(ids) == ["<item_3>", "<item_1>", "<device_tv>"]
    assert tokenizer.decode(ids) == "<item_3><item_1><device_tv>"
    assert opened("nothing <item_99>")["input_ids"] == [opened.unk_token_id] * 2


@pytest.mark.parametrize("words", [["<a>", "<a>"], ["a"], ["<a b>"], ["<|end|>"]])
def test_a_vocabulary_of_bad_words_is_refused(tmp_path, words):
    with pytest.raises(DataError, match="of a vocabulary is"):
        word_tokenizer(words, tmp_path)


def test_labels_of_the_last_answer_become_what_score_heads_learn(tokenizer):
    schema = make_schema(labels=("minutes",))
    events = table((1, 0, 1, "finish"), (1, 1, 2, "finish"), (1, 2, 2, "skip"), minutes=[3.0, 40.5, 0.0])
    (row,) = rows(check_events(events, schema, where="x"), schema)
    assert row["minutes"] == 40.5
    read = RowReader(wanted="conversation", keep=("minutes",))(json.loads(json.dumps(row)))
    encoder = Encoder(
        tokenizer, wanted="conversation", pack_tokens=64, scored=True, numbers=Numbers(ratings=("minutes",))
    )
    (units,) = encoder([read])
    assert not isinstance(units, RowError)
    ((sample,),) = units
    assert sample.fields == {"minutes": 40.5} and sample.input_ids[-1] == tokenizer.stop_id


def test_a_label_that_is_no_number_or_hides_what_rows_hold_is_refused():
    with pytest.raises(DataError, match="the label or feature action is string, no number"):
        check_events(table((1, 0, 1, "finish")), make_schema(labels=("action",)), where="x")
    with pytest.raises(DataError, match="labels name items"):
        make_schema(labels=("items",))


def test_answers_have_what_is_known_before_them_and_what_came_of_them_from_the_cutoff_on():
    table = pa.table(
        {
            "member": [1, 1, 1, 2],
            "time": pa.array(
                [datetime(2025, 1, 1, 10), datetime(2025, 1, 1, 11), datetime(2025, 1, 2), datetime(2025, 1, 2)]
            ),
            "item": [3, 4, 5, 3],
            "hours": [0.5, 0.25, 2.0, 1.0],
            "click": [1, 0, 1, 1],
        }
    )
    numbers = {"features": ("gap_minutes", "click"), "last_features": ("hours",), "labels": ("click", "hours")}
    found = EventSchema(items=PlainItems(range(9)), **numbers)
    first, second = rows(check_events(table, found, where="x"), found, after=datetime(2025, 1, 1, 11))
    answers = [message for message in first["messages"] if message["role"] == "assistant"]
    assert [each["features"] for each in answers] == [
        {"gap_minutes": None, "click": 1.0, "last_hours": None},
        {"gap_minutes": 60.0, "click": 0.0, "last_hours": 0.5},
        {"gap_minutes": 780.0, "click": 1.0, "last_hours": 0.25},
    ]
    assert [each.get("labels") for each in answers] == [None, {"click": 0, "hours": 0.25}, {"click": 1, "hours": 2.0}]
    assert second["messages"][1]["features"]["last_hours"] is None, "another member's hours"
    assert first["hours"] == 2.0
