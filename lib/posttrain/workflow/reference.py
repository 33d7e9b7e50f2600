"""The reference's logprobs become a column of the data: scored once, before the first step, by the policy itself.

Before its first step the policy is the reference, so no second model is loaded. In: token Parquet. Out: the same
units with the field `ref_logprob`, in the same blocks and order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from posttrain import storage
from posttrain.data.pack import pack
from posttrain.data.source import Source
from posttrain.data.token_files import UnitsFile, block_units, read_units, write_units
from posttrain.data.types import Unit
from posttrain.workflow.policy import Policy

FIELD = "ref_logprob"


async def score_file(policy: Policy, path: Path, uri: str) -> None:
    """Publish the units of one file as `uri`/units.parquet, with the field; nothing where that is there already."""
    if not storage.exists(storage.join(uri, "manifest.json")):
        units = await score(policy, read_units(path))
        with storage.staging(uri) as folder:
            write_units(((unit, None) for unit in units), folder / "units.parquet")
            storage.publish(folder, uri)


async def score_source(policy: Policy, source: Source, uri: str) -> Source:
    """Publish the units of a tokenised source, with the field, and open what was published; nothing is done twice."""
    if not storage.exists(storage.join(uri, "manifest.json")):
        with storage.staging(uri) as folder:
            with UnitsFile(folder / "units.parquet") as file:
                for block in range(len(source.block_rows)):
                    hashed = block_units(source, block)
                    units = await score(policy, [unit for unit, _ in hashed])
                    for unit, (_, row_hash) in zip(units, hashed, strict=True):
                        file.add(unit, row_hash)
            storage.publish(folder, uri)
    return Source(storage.join(uri, "units.parquet"), key=source.key)


async def score(policy: Policy, units: Sequence[Unit]) -> list[Unit]:
    """The same units with the field `ref_logprob`: log p of each document's trained tokens, nats."""
    packs = pack(units, pack_tokens=policy.pack_tokens, draws=range(len(units)))
    found: dict[int, Unit] = {}
    for each, logprobs in zip(packs, await policy.document_logprobs(packs), strict=True):
        values: Iterator[float] = iter(logprobs)
        for number in each.draws:
            found[number] = tuple(
                replace(sample, fields=sample.fields | {FIELD: next(values)}) for sample in units[number]
            )
    return [found[number] for number in range(len(units))]
