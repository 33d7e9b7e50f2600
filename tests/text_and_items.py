"""A text model that learned the names of items: a tiny Qwen3 checkpoint, grown by the tokens of semantic IDs."""

from functools import cache
from pathlib import Path

import numpy as np

from posttrain.data.event_world_rows import schema
from posttrain.data.events import check_events, rows
from posttrain.data.semantic_ids import SemanticIds, fit_semantic_ids
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.train_tokenizer import train_tokenizer
from posttrain.model.build import build_model, fresh_config
from posttrain.model.export import export_model
from posttrain.model.load import load_decoder
from small_events import WORLD
from tiny import TEXTS


@cache
def ids() -> SemanticIds:
    known = np.flatnonzero(~WORLD.cold)
    return fit_semantic_ids(known.tolist(), WORLD.item_embeddings[known], levels=2, codes=8, last_codes=8, seed=0)


def events(seed: int):
    """Rows of events, their items written as codes."""
    found = schema(ids())
    return rows(check_events(WORLD.events(), found, where="the small world"), found, before=WORLD.cutoff)


def held_out(seed: int):
    found = schema(ids())
    table = check_events(WORLD.events(), found, where="the small world")
    return list(rows(table, found, after=WORLD.cutoff))[:8]


def checkpoint(folder: Path) -> Path:
    """A text model, as it might be downloaded: 300 tokens, heads of 32."""
    train_tokenizer(TEXTS, folder, vocab_size=300)
    size = BaseHFModelTokenizer(folder).vocab_size
    shape = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_size": 128}
    build_model(folder, fresh_config(vocab_size=size, max_length=512, **shape), seed=0)
    return folder


def grown(text: Path, folder: Path) -> Path:
    """The same model with rows for every token of the events' schema, its names of items beside it."""
    tokenizer = BaseHFModelTokenizer(text)
    tokenizer.add_tokens(schema(ids()).vocabulary)
    export_model(load_decoder(text, vocab_size=tokenizer.max_id + 1), folder, like=text)
    tokenizer.save(folder)
    ids().save(folder)
    return folder
