"""Canonical rows become Units of at most T tokens: tokenised, masked, and cut or refused when they are too long."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from posttrain.data.masks import TrainOn
from posttrain.data.sample import shift
from posttrain.data.tokenizer import BaseHFModelTokenizer, Encoded
from posttrain.data.types import Row, Unit
from posttrain.errors import DataError, RowError

OverLong = Literal["error", "drop", "truncate", "split"]
"""What becomes of a unit that is longer than a pack."""

CHOSEN_DROPS = ("too_long", "nothing_left")
"""Reasons that the user's own policy causes: counted, but not as bad rows."""


class Encoder:
    """Rows of one kind to Units, a batch at a time.

    Raises:
        DataError: pairs cannot be split: both sides would lose their common pack.
    """

    def __init__(
        self,
        tokenizer: BaseHFModelTokenizer,
        *,
        wanted: str,
        pack_tokens: int,
        over_long: OverLong = "error",
        train_on: TrainOn = "weights",
    ):
        """
        Args:
            wanted: "conversation", "preference" or "text", as in records.py.
        """
        if wanted == "preference" and over_long == "split":
            raise DataError("data.over_long: split cannot be used for pairs; choose error, drop or truncate")
        self.tokenizer, self.wanted = tokenizer, wanted
        self.train_on: TrainOn = train_on
        self.pack_tokens, self.over_long = pack_tokens, over_long

    def __call__(self, rows: Sequence[Row]) -> list[list[Unit] | RowError]:
        """The units of each row, in order: one, or several when a long one is split.

        Raises:
            DataError: a row is too long and the policy is "error"; shows how long the rows are.
        """
        encoded = self._encode(rows)
        sizes = [sum(map(_size, each)) for each in encoded if not isinstance(each, RowError)]
        if self.over_long == "error" and max(sizes, default=0) > self.pack_tokens:
            raise DataError(_too_long(sizes, self.pack_tokens))
        return [each if isinstance(each, RowError) else self._fit(each) for each in encoded]

    def _encode(self, rows: Sequence[Row]) -> list[tuple[Encoded, ...] | RowError]:
        match self.wanted:
            case "conversation":
                found = self.tokenizer.conversations(rows, self.train_on)
            case "preference":
                return [self.tokenizer.pair(row) for row in rows]
            case "text":
                ids = [self.tokenizer.text(row["text"]) for row in rows]
                found = [Encoded(each, np.ones(len(each), np.float32)) for each in ids]
            case _:
                raise AssertionError(f"no encoding for {self.wanted}")
        return [each if isinstance(each, RowError) else (each,) for each in found]

    def _fit(self, documents: tuple[Encoded, ...]) -> list[Unit] | RowError:
        size = sum(map(_size, documents))
        if size <= self.pack_tokens:
            pieces = [documents]
        elif self.over_long == "drop":
            return RowError("too_long", f"{size} tokens; a pack holds {self.pack_tokens}")
        elif self.over_long == "truncate":
            pieces = [_truncate(documents, self.pack_tokens)]
        else:
            pieces = [(piece,) for piece in _split(documents[0], self.pack_tokens)]
        units = [
            tuple(shift(each.token_ids, each.loss_mask) for each in piece)
            for piece in pieces
            if all(each.loss_mask[1:].any() for each in piece)
        ]
        return units or RowError("nothing_left", f"no trained token in the first {self.pack_tokens} of {size} tokens")


def _size(encoded: Encoded) -> int:
    return len(encoded.token_ids) - 1


def _truncate(documents: tuple[Encoded, ...], room: int) -> tuple[Encoded, ...]:
    """Keep the beginnings; of a pair, the shorter side is cut only where half the pack is too little for it."""
    shortest = min(map(_size, documents))
    most = max(room // len(documents), room - shortest * (len(documents) - 1))
    return tuple(Encoded(each.token_ids[: most + 1], each.loss_mask[: most + 1]) for each in documents)


def _split(document: Encoded, room: int) -> list[Encoded]:
    """Pieces that predict every token once: the last token of one is the first that the next one reads."""
    starts = range(0, _size(document), room)
    return [Encoded(document.token_ids[at : at + room + 1], document.loss_mask[at : at + room + 1]) for at in starts]


def _too_long(sizes: list[int], room: int) -> str:
    """How many rows are how long, and what to do about it."""
    lengths, longest = np.array(sizes), max(sizes)
    edges = [room // 4, room // 2, room, 2 * room, 4 * room]
    counts = np.bincount(np.searchsorted(edges, lengths), minlength=len(edges) + 1)
    labels = [f"≤{edge}" for edge in edges] + [f">{edges[-1]}"]
    shown = ", ".join(f"{label}: {count}" for label, count in zip(labels, counts, strict=True) if count)
    return (
        f"{int((lengths > room).sum())} of {len(lengths)} rows are longer than a pack of {room} tokens, the longest "
        f"{longest} ({shown}); raise data.pack_tokens, or choose data.over_long: drop, truncate or split"
    )
