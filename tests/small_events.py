"""The simulated service with few members: rows and a tokenizer as configs/events_sft.yaml names them."""

from functools import cache
from pathlib import Path

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
