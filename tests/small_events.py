"""The simulated service with few members: rows and a tokenizer as configs/events_sft.yaml names them."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from posttrain.data.event_world import World
from posttrain.data.event_world_rows import schema
from posttrain.data.events import check_events, rows
from posttrain.data.item_tokens import PlainItems
from posttrain.data.train_tokenizer import word_tokenizer

WORLD = World(0, members=30, items=40)
SCHEMA = schema(PlainItems(number for number in range(40) if not WORLD.cold[number]))


@cache
def events():
    return check_events(WORLD.events(), SCHEMA, where="the small world")


def training(seed: int):
    return rows(events(), SCHEMA, before=WORLD.cutoff)


def held_out(seed: int):
    return rows(events(), SCHEMA, after=WORLD.cutoff)


def tokenizer(folder: Path, seed: int) -> None:
    word_tokenizer(SCHEMA.vocabulary, folder)


def no_tokenizer(folder: Path, seed: int) -> None:
    """Writes nothing."""


def tasks():
    """The schema with numbers beside the tokens, and the table that has them."""
    numbers = {"features": ("gap_minutes",), "last_features": ("watch_hours",), "labels": ("click", "watch_hours")}
    found = replace(SCHEMA, **numbers)
    table = WORLD.events()
    click = pc.cast(pc.not_equal(table["action"], "skip"), pa.float32())
    table = table.append_column("click", click).append_column("watch_hours", pc.divide(table["watch_minutes"], 60))
    return found, check_events(table, found, where="the small world")


def training_tasks(seed: int):
    found, table = tasks()
    return rows(table, found, before=WORLD.cutoff)


def held_out_tasks(seed: int):
    found, table = tasks()
    return rows(table, found, after=WORLD.cutoff)
