"""Window number -> packs: draw, read, convert, tokenise, pack. A pure function, so any process can compute any window.

Nothing is carried from one window to the next: after a kill, or on another machine, a
window is computed again and is the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from posttrain.data.encode import Encoder
from posttrain.data.mixture import Mixture
from posttrain.data.order import BlockOrder, permutation
from posttrain.data.pack import pack
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


class Units(Protocol):
    """One source of a stream; its own draw numbers -> Units, as a pure function."""

    def units(self, positions: np.ndarray) -> list[list[Unit] | RowError]:
        """The units of draws `positions` [N], several where a long row was split; a RowError, with file and row,
        for a row that has none."""
        ...


class UnitSource:
    """Records, tokenised when they are drawn: their order, format and encoder."""

    def __init__(self, source: Source, encoder: Encoder, *, read: RowReader, seed: int, number: int):
        """
        Args:
            read: record -> checked Row.
            number: place in the mixture; the same file twice is shuffled differently.
        """
        self.source, self.encoder, self.read = source, encoder, read
        self.order = BlockOrder(source.block_rows, source.block_bytes, seed=seed, source=number)

    def units(self, positions: np.ndarray) -> list[list[Unit] | RowError]:
        """As Units.units().

        Raises:
            DataError: a block's bytes are damaged, a row is too long and the policy is "error", or one asks a
                held-out question.
        """
        found = [units for _, units in self.at(*self.order.locate(positions))]
        if len(positions):
            self.source.read_ahead(self.order.group_after(int(positions[-1])).tolist())
        return found

    def at(self, blocks: np.ndarray, rows: np.ndarray) -> list[tuple[Row | None, list[Unit] | RowError]]:
        """The rows at [N] blocks and [N] rows within them (None for one that cannot be read), and their units.

        Raises:
            DataError: as units().
        """
        places = list(zip(blocks.tolist(), rows.tolist(), strict=True))
        found: list[tuple[Row | None, list[Unit] | RowError]] = []
        for place, record in zip(places, self.source.records(blocks, rows), strict=True):
            try:
                found.append((self.read(record), []))
            except RowError as error:
                found.append((None, self._named(error, place)))
            except DataError as error:
                raise DataError(f"{self._where(place)}: {error}") from None
        good = [index for index, (row, _) in enumerate(found) if row is not None]
        try:
            encoded = self.encoder([row for row, _ in found if row is not None])
        except DataError as error:
            raise DataError(f"{self.source.key}: {error}") from None
        for index, units in zip(good, encoded, strict=True):
            named = self._named(units, places[index]) if isinstance(units, RowError) else units
            found[index] = (found[index][0], named)
        return found

    def _where(self, place: tuple[int, int]) -> str:
        return f"{self.source.key}: {self.source.where(*place)}"

    def _named(self, error: RowError, place: tuple[int, int]) -> RowError:
        return RowError(error.reason, f"{self._where(place)}: {error.detail}")


class ChosenUnits:
    """A source of pairs, of which only the chosen answers are drawn: what a warm-up imitates."""

    def __init__(self, pairs: Units):
        self.pairs = pairs

    def units(self, positions: np.ndarray) -> list[list[Unit] | RowError]:
        """As Units.units()."""
        found = self.pairs.units(positions)
        return [each if isinstance(each, RowError) else [unit[:1] for unit in each] for each in found]


class PackStream:
    """A mixture of sources as windows of packs of at most T tokens."""

    def __init__(self, mixture: Mixture, sources: Sequence[Units], *, pack_tokens: int, seed: int):
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
