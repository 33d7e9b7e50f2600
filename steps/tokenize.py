"""A share of the training rows becomes token ids and loss masks on disk; runs beside the other shares, on CPUs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from posttrain import storage
from posttrain.config import RunConfig
from posttrain.data.counts import Counts, check_budget
from posttrain.data.record_checks import row_hash
from posttrain.data.stream import UnitSource
from posttrain.data.token_files import write_units
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.types import Unit
from posttrain.errors import RowError
from posttrain.model.backend import backend_of
from steps.streams import PROVED_ROWS, make_encoder, record_units, reserved_hashes, stored_sources, units_schema

BATCH_ROWS = 1024
"""Rows that are tokenised in one call."""


def tokenize(config: RunConfig, *, root: str, data_uri: str, model_uri: str, part: list[int]) -> dict[str, Any]:
    """Write token Parquet of one share: [source, first block, end block].

    Returns:
        uri of the folder, None for an empty share; the source; and Counts.

    Raises:
        DataError: more bad rows than data.max_bad_rows, a row too long, a held-out question among them, a damaged
            file, or a template whose mask cannot be proved.
    """
    number, first, end = part
    if first == end:
        return {"uri": None, "source": number, "counts": Counts().plain()}
    uri = storage.join(root, "tokens", f"source_{number:03d}_block_{first:06d}")

    def write(folder: Path) -> None:
        source = _source(config, data_uri, model_uri, number)
        counts = Counts()
        units = _units(config, source, range(first, end), counts)
        write_units(units, folder / "units.parquet", schema=units_schema(config))
        (folder / "counts.json").write_text(json.dumps(counts.plain()))

    storage.ensure_folder(uri, write)
    return {"uri": uri, "source": number, "counts": json.loads(storage.read_bytes(storage.join(uri, "counts.json")))}


def _source(config: RunConfig, data_uri: str, model_uri: str, number: int) -> UnitSource:
    data, model = storage.fetch(data_uri), storage.fetch(model_uri)
    tokenizer = BaseHFModelTokenizer(model)
    encoder = make_encoder(config, tokenizer, backend_of(config.model.backend).shape(model), prove=PROVED_ROWS)
    return record_units(config, stored_sources(data), encoder, reserved=reserved_hashes(data))[number]


def _units(config: RunConfig, source: UnitSource, blocks: range, counts: Counts) -> Iterator[tuple[Unit, int | None]]:
    """The units of these blocks in file order, the first of every row with the row's hash; counts everything."""
    unknown_id = source.encoder.unknown_id
    for block in blocks:
        rows = int(source.source.block_rows[block])
        source.source.read_ahead(range(block + 1, min(block + 2, blocks.stop)))
        for start in range(0, rows, BATCH_ROWS):
            here = np.arange(start, min(start + BATCH_ROWS, rows))
            for row, found in source.at(np.full(len(here), block), here):
                counts.add(found, unknown_id=unknown_id)
                if row is not None and not isinstance(found, RowError):
                    yield from zip(found, [row_hash(row), *[None] * (len(found) - 1)], strict=True)
            check_budget([counts], max_bad_rows=config.data.max_bad_rows)


if __name__ == "__main__":
    from steps.program import main

    main(tokenize)
