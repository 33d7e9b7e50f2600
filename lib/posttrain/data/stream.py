"""Window number -> packs: draw, read, convert, tokenise, pack. A pure function, so any process can compute any window.

Nothing is carried from one window to the next: after a kill, or on another machine, a
window is computed again and is the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from posttrain.data.encode import Encoder
from posttrain.data.mixture import Mixture
from posttrain.data.order import BlockOrder, permutation
from posttrain.data.pack import pack
from posttrain.data.records import Format
from posttrain.data.row_reader import RowReader
from posttrain.data.source import Source
from posttrain.data.types import Pack, Row, Unit
from posttrain.errors import DataError, RowError

_SHUFFLE = 0x7061636B
"""Keeps the order of packs apart from other random numbers under the same seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A draw that gave no unit, and why."""

    draw: int
    reason: str
    where: str
    """File and row, and what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What W draws came to."""

    index: int
    packs: tuple[Pack, ...]
    """In an order of their own: best-fit-decreasing alone would put the long documents first."""
    dropped: tuple[Dropped, ...]
    num_draws: int
    """0 where the mixture has ended."""
    counts: tuple[int, ...]
    """Draws of every source up to the end of this window."""


class UnitSource:
    """One source's draw numbers -> Units: its order, its format, its encoder."""

    def __init__(
        self,
        source: Source,
        encoder: Encoder,
        *,
        seed: int,
        number: int,
        format: Format | None = None,
        role_map: Mapping[str, str] | None = None,
    ):
        """
        Args:
            number: place in the mixture; the same file twice is shuffled differently.
            format: of every record; None detects it from each record's columns.
        """
        self.source, self.encoder = source, encoder
        self.read = RowReader(wanted=encoder.wanted, format=format, role_map=role_map)
        self.order = BlockOrder(source.block_rows, source.block_bytes, seed=seed, source=number)

    def units(self, positions: np.ndarray) -> list[list[Unit] | RowError]:
        """The units of draws `positions` [N] of this source; a RowError, with file and row, for one that has none."""
        blocks, rows = self.order.locate(positions)
        places = list(zip(blocks.tolist(), rows.tolist(), strict=True))
        found: list[list[Unit] | RowError | None] = [None] * len(places)
        good: list[tuple[int, Row]] = []
        for index, record in enumerate(self.source.records(blocks, rows)):
            try:
                good.append((index, self.read(record)))
            except RowError as error:
                found[index] = error
        encoded = self.encoder([row for _, row in good])
        for (index, _), units in zip(good, encoded, strict=True):
            found[index] = units
        if len(positions):
            self.source.read_ahead(self.order.group_after(int(positions[-1])).tolist())
        return [self._named(each, place) for each, place in zip(found, places, strict=True)]

    def _named(self, found: list[Unit] | RowError | None, place: tuple[int, int]) -> list[Unit] | RowError:
        assert found is not None, "every record became units or an error"
        if isinstance(found, RowError):
            return RowError(found.reason, f"{self.source.key}: {self.source.where(*place)}: {found.detail}")
        return found


class PackStream:
    """A mixture of sources as windows of packs of at most T tokens."""

    def __init__(self, mixture: Mixture, sources: Sequence[UnitSource], *, pack_tokens: int, seed: int):
        if len(sources) != len(mixture.parts):
            raise DataError(f"the mixture has {len(mixture.parts)} parts and {len(sources)} sources")
        self.mixture, self.sources = mixture, list(sources)
        self.pack_tokens, self.seed = pack_tokens, seed

    def window(self, index: int) -> Window:
        """The packs of window `index`; no unit split over packs, lost or repeated.

        Raises:
            DataError: a file is damaged, or a row is too long and the policy is "error".
        """
        draws = self.mixture.window(index)
        found: list[list[Unit] | RowError] = [[]] * len(draws.source)
        for number, source in enumerate(self.sources):
            mine = np.flatnonzero(draws.source == number)
            for place, units in zip(mine, source.units(draws.position[mine]), strict=True):
                found[place] = units
        units, numbers, dropped = [], [], []
        for n, each in enumerate(found, start=draws.first):
            if isinstance(each, RowError):
                dropped.append(Dropped(draw=n, reason=each.reason, where=each.detail))
            else:
                units += each
                numbers += [n] * len(each)
        packs = pack(units, pack_tokens=self.pack_tokens, draws=numbers)
        order = permutation(len(packs), self.seed, _SHUFFLE, index)
        return Window(
            index=index,
            packs=tuple(packs[i] for i in order),
            dropped=tuple(dropped),
            num_draws=len(found),
            counts=tuple(self.mixture.counts_before(index + 1).tolist()),
        )
