"""RL on a business metric: slates of distinct items, written as semantic IDs, shown to members of the simulated World.

A prompt is a member's history and the moment of the visit; the answer is SIZE items and the end of the turn. Member
and moment decide with the World's own probabilities what is played, so the metric's truth is known. The policy is
warmed up on slates of what members went on to play (demonstrations), and RL then raises what they play of its slates.
Rows before the World's cutoff train; held-out ones come after it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from posttrain.data.event_world import Event, World
from posttrain.data.semantic_ids import SemanticIds, fit_semantic_ids

if TYPE_CHECKING:  # processes that play episodes have no use for tables and tensors
    from posttrain.data.environment import Talk
    from posttrain.data.event_schema import EventSchema
    from posttrain.data.item_tokens import ItemTokens
    from posttrain.data.token_trie import Slate
    from posttrain.data.types import Row

SIZE = 5
"""Items of a slate."""
HISTORY = 12
"""Events before a visit that a prompt tells."""
VISITS = 8
"""Simulated visits whose mean is an episode's engagement; as if the slate were shown so often."""
VALUE = {"finish": 1.0, "play": 0.5, "skip": 0.0, "unseen": 0.0}
"""What an action is worth."""
DISCOUNT, DIVERSITY = 0.9, 0.5
"""Of each place after the first; weight of the mean distance between two items, 0 for the same content, 2 at most."""
REPEATED = 3.0
"""Guardrail `repeats`: what a slate of nothing but them costs. Members do play again what they know, so that at 1 a
policy learns to show more of it for the engagement."""
LONG_MINUTES, LONG_SHARE = 95.0, 0.2
"""Guardrail `too_long`: the share of longer items beyond this one is charged."""
GUARDRAILS = ("repeats", "too_long", "invalid")
"""Parts of the reward that only cost: each is minus a share of the slate, times a weight."""


@lru_cache(maxsize=4)
def world(seed: int) -> World:
    """The World of a run's seed."""
    return World(seed)


@lru_cache(maxsize=4)
def item_ids(seed: int) -> SemanticIds:
    """Semantic IDs of what is released before the cutoff; add() names the cold ones."""
    known = np.flatnonzero(~world(seed).cold)
    facts = {"levels": 2, "codes": 12, "last_codes": 24}  # few enough that a new item mostly has siblings
    return fit_semantic_ids(known.tolist(), world(seed).item_embeddings[known], **facts, seed=seed)


@lru_cache(maxsize=4096)
def history(seed: int, member: int) -> list[Event]:
    """All events of a member."""
    return world(seed).history(member)


def schema(ids: ItemTokens) -> EventSchema:
    """How prompts write a history, its items named by `ids`: that of the World's rows, any event the last."""
    from posttrain.data import event_world_rows

    return replace(event_world_rows.schema(ids), trained={}, max_events=HISTORY)


def tokenizer(folder: Path, seed: int) -> None:
    """Of `model.fresh.tokenizer`: a token a word of the schema, and the semantic IDs beside it."""
    from posttrain.data.train_tokenizer import word_tokenizer

    word_tokenizer(schema(item_ids(seed)).vocabulary, folder)
    item_ids(seed).save(folder)


def demonstrations(seed: int, count: int = 4096) -> list[Row]:
    """Conversations that end with a slate of the next items that the member played, before the cutoff."""
    rows = []
    for member, place in _drawn(seed, 6):
        if len(rows) == count:
            break
        coming = [e for e in history(seed, member)[place:] if e.time < world(seed).cutoff and e.action != "skip"]
        slate = list(dict.fromkeys(event.item for event in coming))[:SIZE]
        if len(slate) == SIZE:
            names = "".join(token for item in slate for token in item_ids(seed).tokens(item))
            asked = visit(seed, member, place, item_ids(seed))["messages"]
            told = [each | {"weight": 0} if each["role"] == "assistant" else each for each in asked]
            rows.append({"messages": [*told, {"role": "assistant", "content": names, "weight": 1}]})
    return rows


def prompts(seed: int, count: int = 2048) -> list[Row]:
    """Visits before the cutoff."""
    return [visit(seed, *each, item_ids(seed)) for each in _drawn(seed, 7)[:count]]


def held_out(seed: int, count: int = 128) -> list[Row]:
    """The first visit of members after the cutoff."""
    first = dict(reversed(visits(seed, after=True)))
    return [visit(seed, *each, item_ids(seed)) for each in sorted(first.items())[:count]]


def visits(seed: int, *, after: bool) -> list[tuple[int, int]]:
    """(member, place) of the events that have four or more before them, on one side of the cutoff."""
    cutoff = world(seed).cutoff
    return [
        (member, place)
        for member in range(len(world(seed).activity))
        for place, event in enumerate(history(seed, member))
        if place >= 4 and (event.time >= cutoff) == after
    ]


def visit(seed: int, member: int, place: int, ids: ItemTokens) -> Row:
    """The prompt of an event: what was before it, items named by `ids`, and the moment; the `item` that was taken."""
    import pyarrow as pa

    from posttrain.data.events import question, rows

    told = history(seed, member)[max(0, place + 1 - HISTORY) : place + 1]
    columns = dict(zip(Event._fields, map(list, zip(*told, strict=True)), strict=True))
    table = pa.table({"member": [member] * len(told), **columns})
    (*_, last) = rows(table, schema(ids))
    return question(last) | {"world": seed, "member": member, "place": place}


def slates(folder: Path) -> Slate:
    """The constraint: SIZE distinct items of the semantic IDs beside the model, then the end of the turn."""
    from posttrain.data.token_trie import Slate, trie_of
    from posttrain.data.tokenizer import BaseHFModelTokenizer

    tokenizer, ids = BaseHFModelTokenizer(folder), SemanticIds.load(folder)
    trie = trie_of(map(ids.tokens, ids.items.tolist()), tokenizer.hf.get_vocab())
    return Slate(trie, size=SIZE, stop_id=tokenizer.stop_id)


class Members:
    """The rollout.environment: reads `world`, `member` and `place` of the row, and shows the slate to that member."""

    constraint = "posttrain.data.event_slates:slates"

    async def rollout(self, row: Row, talk: Talk) -> dict[str, float]:
        """One visit, simulated VISITS times; see judged()."""
        said = await talk.turn()
        rng = np.random.default_rng(talk.random.getrandbits(64))
        return judged(row, read_slate(said or "", item_ids(row["world"])), rng)


def read_slate(text: str, ids: SemanticIds) -> list[int]:
    """Items of a slate's text, -1 for a name that is no item's; at most SIZE."""
    length, named = ids.codes.shape[1], _named(ids)
    found = re.findall(r"<[^<>]*>", text)
    return [named.get(tuple(found[i : i + length]), -1) for i in range(0, len(found), length)][:SIZE]


def judged(row: Row, slate: list[int], rng: np.random.Generator) -> dict[str, float]:
    """The parts of a slate's reward.

    engagement: sum over places of DISCOUNT ** place times the VALUE of what the member did, mean of VISITS.
    diversity: DIVERSITY times the mean of 1 - cosine of two items' embeddings.
    repeats: minus REPEATED times the share of items that the member has played in the events that the prompt tells.
    too_long: minus what the share of items longer than LONG_MINUTES exceeds LONG_SHARE by.
    invalid: minus the share of places without an item, or with one that the slate has already.
    """
    truth, events = world(row["world"]), history(row["world"], row["member"])
    past, now = events[: row["place"]], events[row["place"]].time
    items = list(dict.fromkeys(item for item in slate if item >= 0))
    seen = {event.item for event in past[1 - HISTORY :] if event.action != "skip"}
    worth = [
        sum(DISCOUNT**place * VALUE[each.action] for place, each in enumerate(shown))
        for shown in (truth.respond(row["member"], past, items, rng, now) for _ in range(VISITS))
    ]
    long = sum(truth.length_minutes[item] > LONG_MINUTES for item in items) / SIZE
    content = truth.item_embeddings / np.linalg.norm(truth.item_embeddings, axis=1, keepdims=True)
    apart = [1.0 - float(content[a] @ content[b]) for a, b in combinations(items, 2)]
    return {
        "engagement": fmean(worth),
        "diversity": DIVERSITY * fmean(apart) if apart else 0.0,
        "repeats": -REPEATED * sum(item in seen for item in items) / SIZE,
        "too_long": -max(0.0, float(long) - LONG_SHARE),
        "invalid": -(SIZE - len(items)) / SIZE,
    }


@lru_cache(maxsize=4)
def _named(ids: SemanticIds) -> dict[tuple[str, ...], int]:
    return {ids.tokens(item): item for item in ids.items.tolist()}


def _drawn(seed: int, stream: int) -> list[tuple[int, int]]:
    """Visits before the cutoff, in an order of chance."""
    found = visits(seed, after=False)
    return [found[i] for i in np.random.default_rng([seed, stream]).permutation(len(found)).tolist()]
