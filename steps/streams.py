"""The stream of packs that a run trains on, from its config and the folders that the steps before left."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain import storage
from posttrain.config import DataSource, RunConfig
from posttrain.data.encode import Encoder
from posttrain.data.mixture import Mixture, Part, window_draws
from posttrain.data.record_checks import question_hash
from posttrain.data.records import Format
from posttrain.data.row_reader import RowReader
from posttrain.data.source import Source, stored_rows
from posttrain.data.stream import ChosenUnits, PackStream, Units, UnitSource
from posttrain.data.token_files import BESIDE, TokenUnits, read_units, schema_with
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.types import Unit
from posttrain.errors import DataError
from posttrain.model.backend import backend_of
from posttrain.model.families import DecoderConfig
from steps.recipes import WARMUP, Rows, rows_of

RESERVED = "reserved.json"
"""Hashes of the held-out questions, beside the tokens."""

HELD_OUT_UNITS = "held_out_units.parquet"
"""What an offline recipe is evaluated on, tokenised."""

HELD_OUT_SLICES = "held_out_slices.json"
"""Beside them, where eval.slice_by asks for it: the slice of every unit, in order."""

PROVED_ROWS = 256
"""Rows whose prompt is rendered a second time, to prove that it is served as it was trained."""


def open_stream(config: RunConfig, *, tokens_uri: str, model_uri: str, stage: str = WARMUP) -> PackStream:
    """The stream of a stage, in any process: a function of the config and the two folders alone.

    Args:
        tokens_uri: what the step merge_tokens published.
        stage: the warm-up on pairs draws their chosen answers only.
    """
    folder = storage.fetch(tokens_uri)
    sources = stored_sources(folder)
    chosen_only = stage == WARMUP and rows_of(config).wanted == "preference"
    if config.data.tokenize == "ahead":
        return pack_stream(config, token_units(config, sources), sources, chosen_only=chosen_only)
    reserved = frozenset(map(bytes.fromhex, json.loads((folder / RESERVED).read_text())))
    model_folder = storage.fetch(model_uri)
    encoder = make_encoder(
        config, BaseHFModelTokenizer(model_folder), backend_of(config.model.backend).shape(model_folder)
    )
    units = record_units(config, sources, encoder, reserved=reserved)
    return pack_stream(config, units, sources, chosen_only=chosen_only)


def pack_stream(
    config: RunConfig, units: Sequence[Units], sources: Sequence[Source], *, chosen_only: bool = False
) -> PackStream:
    """Sources mixed as the config says."""
    parts = [
        Part(
            name=source.key,
            num_rows=source.num_rows,
            weight=entry.schedule,
            max_draws=None if entry.epochs is None else max(1, round(entry.epochs * source.num_rows)),
        )
        for entry, source in zip(config.data.sources, sources, strict=True)
    ]
    mixture = Mixture(parts, seed=config.seed, window=window_draws(config.data.pack_tokens))
    units = [ChosenUnits(each) for each in units] if chosen_only else units
    return PackStream(mixture, units, pack_tokens=config.data.pack_tokens, seed=config.seed)


def token_units(config: RunConfig, sources: Sequence[Source]) -> list[TokenUnits]:
    """Tokenised sources as a stream draws from them."""
    return [TokenUnits(source, seed=config.seed, number=number) for number, source in enumerate(sources)]


def record_units(
    config: RunConfig, sources: Sequence[Source], encoder: Encoder, *, reserved: frozenset[bytes]
) -> list[UnitSource]:
    """Raw sources, tokenised as they are drawn; a row that asks what a held-out row asks is refused.

    Args:
        reserved: hashes of what held-out rows ask.
    """
    rows = rows_of(config)
    return [
        UnitSource(source, encoder, read=row_reader(entry, rows, held_out=reserved), seed=config.seed, number=number)
        for number, (entry, source) in enumerate(zip(config.data.sources, sources, strict=True))
    ]


def row_reader(entry: DataSource, rows: Rows, *, held_out: frozenset[bytes] = frozenset()) -> RowReader:
    """What reads one source's records."""
    format = Format(entry.format) if entry.format else None
    return RowReader(
        wanted=rows.wanted, format=format, role_map=entry.role_map, held_out=held_out, keep=rows.numbers.ratings
    )


def make_encoder(
    config: RunConfig, tokenizer: BaseHFModelTokenizer, shape: DecoderConfig | None, *, prove: int = 0
) -> Encoder:
    """What turns rows into units that fit a pack and the model.

    Args:
        shape: of the model; None where there is none yet.

    Raises:
        DataError: the tokenizer writes ids that the model has no row for.
    """
    limit = config.data.pack_tokens
    if shape is not None:
        check_ids(tokenizer, shape)
        limit = min(limit, shape.max_length)
    rows = rows_of(config)
    return Encoder(
        tokenizer,
        wanted=rows.wanted,
        scored=rows.scored,
        numbers=rows.numbers,
        pack_tokens=limit,
        over_long=config.data.over_long,
        train_on=config.data.train_on,
        prove=prove,
    )


def check_ids(tokenizer: BaseHFModelTokenizer, shape: DecoderConfig) -> None:
    """Refuse a tokenizer that writes ids beyond the model's embedding.

    Raises:
        DataError: says both numbers.
    """
    if tokenizer.max_id >= shape.vocab_size:
        raise DataError(
            f"the tokenizer writes ids up to {tokenizer.max_id}, the model has {shape.vocab_size} embedding rows; "
            "bring the tokenizer that the model was trained with"
        )


def units_schema(config: RunConfig) -> Any:
    """The columns of the recipe's token files before a teacher says anything."""
    numbers = rows_of(config).numbers
    return schema_with(name for name in BESIDE if getattr(numbers, name))


def reserved_hashes(folder: Path) -> frozenset[bytes]:
    """What the held-out rows and the questions of an evaluation ask, from the folder that prepare wrote.

    No row that asks one of these may be trained on.
    """
    sets = [folder / f"{name}.parquet" for name in ("held_out", "questions")]
    return frozenset(question_hash(row) for path in sets if path.exists() for row in stored_rows(path))


def held_out_units(tokens_uri: str) -> list[Unit]:
    """What an offline recipe is evaluated on."""
    return read_units(storage.fetch(tokens_uri) / HELD_OUT_UNITS)


def held_out_slices(config: RunConfig, tokens_uri: str) -> list[str]:
    """The slice of each of held_out_units(); none where the config asks for none."""
    path = storage.fetch(tokens_uri) / HELD_OUT_SLICES
    return json.loads(path.read_text()) if config.eval.slice_by is not None else []


def stored_sources(folder: Path) -> list[Source]:
    """The sources whose index store_sources() wrote."""
    return [Source.indexed(index) for index in json.loads((folder / "sources.json").read_text())]


def store_sources(sources: Sequence[Source], folder: Path) -> None:
    """Keep the index of sources, so that no later reader has to look through their files."""
    indexes: list[dict[str, Any]] = [source.plain_index() for source in sources]
    (folder / "sources.json").write_text(json.dumps(indexes))


def shares_of(sources: Sequence[Source], *, part_bytes: int = 256 * 1024 * 1024, most: int = 90) -> list[list[int]]:
    """Shares of tokenising that can be done apart: [source, first block, end block], of about `part_bytes` each.

    Never none, as Metaflow's foreach needs one, nor many more than `most`, as it allows 100. An empty share is
    [0, 0, 0].
    """
    total = sum(int(source.block_bytes.sum()) for source in sources)
    size = max(part_bytes, math.ceil(total / most))
    found: list[list[int]] = []
    for number, source in enumerate(sources):
        first, held = 0, 0
        for block, length in enumerate(source.block_bytes.tolist()):
            held += length
            if held >= size or block + 1 == len(source.block_bytes):
                found.append([number, first, block + 1])
                first, held = block + 1, 0
    return found or [[0, 0, 0]]
