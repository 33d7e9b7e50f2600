"""The simulated service as a data set: the rows and the tokenizer that configs/events_sft.yaml names.

The same few lines over read_events(PATH, SCHEMA) in place of the world make a data set of anyone's own table.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from posttrain.data.event_schema import EventSchema, Field
from posttrain.data.event_world import ACTIONS, DEVICES, World
from posttrain.data.events import check_events, rows
from posttrain.data.item_tokens import ItemTokens, PlainItems
from posttrain.data.train_tokenizer import word_tokenizer
from posttrain.data.types import Row


def schema(items: ItemTokens) -> EventSchema:
    """How the world's events are written, whatever its items are called; trained are the items that were played."""
    return EventSchema(
        items=items,
        context=(Field(column="hour", edges=(6, 12, 18)), Field(column="device", values=DEVICES)),
        outcome=(Field(column="action", values=ACTIONS),),
        trained={"action": ("finish", "play")},
    )


def tasks_schema(items: ItemTokens) -> EventSchema:
    """The same with numbers beside the tokens: for method.side and method.heads of configs/events_tasks.yaml."""
    read, told = ("gap_minutes",), ("watch_hours",)
    return replace(schema(items), features=read, last_features=told, labels=("click", "watch_hours"))


@lru_cache(maxsize=1)
def world_and_events(seed: int) -> tuple[World, pa.Table]:
    """The world of a seed, and all that its members did."""
    world = World(seed)
    return world, check_events(world.events(), schema(PlainItems(())), where=f"World({seed})")


@lru_cache(maxsize=1)
def plain_items(seed: int) -> PlainItems:
    """Names of the items that occur before the cutoff: what a vocabulary of plain ids can know."""
    world, events = world_and_events(seed)
    early = events.filter(pc.field("time") < pa.scalar(world.cutoff, pa.timestamp("us")))
    return PlainItems(early["item"].to_pylist())


def training(seed: int) -> Iterator[Row]:
    """Everything before the cutoff."""
    world, events = world_and_events(seed)
    return rows(events, schema(plain_items(seed)), before=world.cutoff)


def held_out(seed: int) -> Iterator[Row]:
    """Everything since, each event after all that lies before it."""
    world, events = world_and_events(seed)
    return rows(events, schema(plain_items(seed)), after=world.cutoff)


def training_tasks(seed: int) -> Iterator[Row]:
    """training(), with the numbers of tasks_schema()."""
    return rows(_outcomes(seed), tasks_schema(plain_items(seed)), before=world_and_events(seed)[0].cutoff)


def held_out_tasks(seed: int) -> Iterator[Row]:
    """held_out(), with them."""
    return rows(_outcomes(seed), tasks_schema(plain_items(seed)), after=world_and_events(seed)[0].cutoff)


def _outcomes(seed: int) -> pa.Table:
    """All events, and what came of each as numbers: whether it was played, and hours."""
    table = world_and_events(seed)[0].events()
    numbers = {"click": table["action"].to_numpy() != "skip", "watch_hours": table["watch_minutes"].to_numpy() / 60}
    for name, values in numbers.items():
        table = table.append_column(name, pa.array(values.astype("float32")))
    return check_events(table, tasks_schema(PlainItems(())), where=f"World({seed})")


def tokenizer(folder: Path, seed: int) -> None:
    """Of `model.fresh.tokenizer`: one token a word of the schema."""
    word_tokenizer(schema(plain_items(seed)).vocabulary, folder)
