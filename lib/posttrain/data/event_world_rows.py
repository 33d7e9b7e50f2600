"""The simulated service as a data set: the rows and the tokenizer that configs/events_sft.yaml names.

The same few lines over read_events(PATH, SCHEMA) in place of the world make a data set of anyone's own table.
"""

from collections.abc import Iterator
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


def tokenizer(folder: Path, seed: int) -> None:
    """Of `model.fresh.tokenizer`: one token a word of the schema."""
    word_tokenizer(schema(plain_items(seed)).vocabulary, folder)
