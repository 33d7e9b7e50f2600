"""Canonical rows become Units of at most T tokens: tokenised, masked, and cut or refused when they are too long."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from posttrain.data.masks import TrainOn
from posttrain.data.ratings import ratings_of
from posttrain.data.record_checks import question_key
from posttrain.data.sample import shift
from posttrain.data.tokenizer import BaseHFModelTokenizer, Encoded
from posttrain.data.turn_numbers import NOTHING, Numbers, with_numbers
from posttrain.data.types import Row, Sample, Unit
from posttrain.errors import DataError, RowError

OverLong = Literal["error", "drop", "truncate", "split"]
"""What becomes of a unit that is longer than a pack."""

MOST_UNKNOWN = 0.1
"""Share of unknown tokens in a document. A rare character here and there stays far below; a text in a script that
the vocabulary lacks lies far above, and would teach the model to write the unknown token."""

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
        scored: bool = False,
        numbers: Numbers = NOTHING,
        prove: int = 0,
    ):
        """
        Args:
            wanted: "conversation", "preference", "unpaired" or "text", as in records.py.
            scored: the model is to read every answer up to its stop token, where a score is taken, and no further; a
                pair gets the field `margin`, 0 where the row has none, and an unpaired answer the field `label`.
            numbers: of conversations. Ratings, of scored ones, become fields; their last answer is what is scored.
            prove: of so many conversations, the first that come, the prompt is also rendered as it will be served and
                compared with what is trained. (Of a pair it always is.)
        """
        if wanted == "preference" and over_long == "split":
            raise DataError("data.over_long: split cannot be used for pairs; choose error, drop or truncate")
        self.tokenizer, self.wanted = tokenizer, wanted
        self.train_on: TrainOn = train_on
        self.scored, self.numbers = scored, numbers
        self.pack_tokens, self.over_long = pack_tokens, over_long
        self._to_prove = prove if wanted == "conversation" else 0
        steers = {*tokenizer.stop_ids, tokenizer.pad_id, tokenizer.hf.bos_token_id}
        unknown: int | None = tokenizer.hf.unk_token_id
        self.unknown_id = None if unknown in steers else unknown
        """Id of what the vocabulary lacks; None also where it is the eos token by another name, as GPT-2's is."""

    def __call__(self, rows: Sequence[Row]) -> list[list[Unit] | RowError]:
        """The units of each row, in order: one, or several when a long one is split. A RowError for a row without:
        the tokenizer's, `no_trained_token`, `unknown_tokens`, or one of CHOSEN_DROPS.

        Raises:
            DataError: a row is too long and the policy is "error"; shows how long the rows are. Or a prompt would be
                served otherwise than it is trained.
        """
        encoded = [self._checked(row, each) for row, each in zip(rows, self._encode(rows), strict=True)]
        sizes = [sum(map(_size, each)) for each in encoded if not isinstance(each, RowError)]
        if self.over_long == "error" and max(sizes, default=0) > self.pack_tokens:
            raise DataError(_too_long(sizes, self.pack_tokens))
        return [
            each if isinstance(each, RowError) else self._fit(each, self._fields(row))
            for row, each in zip(rows, encoded, strict=True)
        ]

    def _fields(self, row: Row) -> dict[str, float]:
        """What is known of every document of a row beside its tokens."""
        if not self.scored:
            return {}
        if self.wanted == "conversation":
            return ratings_of(row, self.numbers.ratings)
        return {"label": float(row["label"])} if self.wanted == "unpaired" else {"margin": row.get("margin", 0.0)}

    def _encode(self, rows: Sequence[Row]) -> list[tuple[Encoded, ...] | RowError]:
        found = self._tokenized(rows)
        if not self.scored:
            return found
        return [each if isinstance(each, RowError) else tuple(map(_up_to_the_stop, each)) for each in found]

    def _tokenized(self, rows: Sequence[Row]) -> list[tuple[Encoded, ...] | RowError]:
        match self.wanted:
            case "conversation":
                train_on = "last" if self.scored else self.train_on
                found = (
                    with_numbers(self.tokenizer, rows, train_on, self.numbers)
                    if self.numbers.of_turns
                    else self.tokenizer.conversations(rows, train_on)
                )
            case "unpaired":
                found = self.tokenizer.conversations(rows, "last")
            case "preference":
                return [self.tokenizer.pair(row) for row in rows]
            case "text":
                found = [self._text(row) for row in rows]
            case _:
                raise AssertionError(f"no encoding for {self.wanted}")
        return [each if isinstance(each, RowError) else (each,) for each in found]

    def _text(self, row: Row) -> Encoded | RowError:
        try:
            ids = self.tokenizer.text(row["text"])
        except RowError as error:
            return error
        return Encoded(ids, np.ones(len(ids), np.float32))

    def _checked(self, row: Row, found: tuple[Encoded, ...] | RowError) -> tuple[Encoded, ...] | RowError:
        """What was found, or why it must not be trained."""
        if isinstance(found, RowError):
            return found
        try:
            ratings_of(row, self.numbers.ratings) if self.numbers.ratings else None
        except RowError as error:
            return error
        if not all(each.loss_mask[1:].any() for each in found):
            count = sum(len(each.token_ids) for each in found)
            return RowError("no_trained_token", f"none of its {count} tokens carries loss; drop the row")
        if self.unknown_id is not None:
            share = max(float(np.mean(each.token_ids == self.unknown_id)) for each in found)
            if share > MOST_UNKNOWN:
                return RowError(
                    "unknown_tokens",
                    f"{share:.0%} of its tokens are {self.tokenizer.hf.unk_token}, as {self._unknown_word(row)!r:.60}; "
                    "the tokenizer was made for other text: choose another model, or drop the row",
                )
        if self._to_prove > 0:
            self._to_prove -= 1
            try:
                self.tokenizer.check_no_skew(row["messages"], row.get("tools"))
            except DataError as error:
                # never a RowError: which rows are proved depends on the process, and a window's units must not
                raise DataError(f"{error}; found with the question {question_key(row)[:120]!r}") from None
        return found

    def _unknown_word(self, row: Row) -> str:
        """The first word of a row that the tokenizer does not know."""
        messages = [message for side in ("messages", "prompt", "chosen", "rejected") for message in row.get(side, [])]
        words = " ".join([row.get("text", ""), *(message["content"] for message in messages)]).split()
        encode = self.tokenizer.hf.encode
        return next((word for word in words if self.unknown_id in encode(word, add_special_tokens=False)), "")

    def _fit(self, documents: tuple[Encoded, ...], fields: dict[str, float]) -> list[Unit] | RowError:
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
            tuple(replace(_shifted(each, self.numbers), fields=fields) for each in piece)
            for piece in pieces
            if all(each.loss_mask[1:].any() for each in piece)
        ]
        return units or RowError("nothing_left", f"no trained token in the first {self.pack_tokens} of {size} tokens")


def _up_to_the_stop(encoded: Encoded) -> Encoded:
    """Without what a template writes after the last trained token, which is repeated: the shift takes one away."""
    end = int(np.flatnonzero(encoded.loss_mask)[-1]) + 1 if encoded.loss_mask.any() else len(encoded.token_ids)
    ids, mask = encoded.token_ids[:end], encoded.loss_mask[:end]
    return Encoded(np.append(ids, ids[-1]), np.append(mask, np.float32(0)))


def _shifted(encoded: Encoded, numbers: Numbers) -> Sample:
    sample = shift(encoded.token_ids, encoded.loss_mask)
    if encoded.numbers is None:
        return sample
    features, labels = np.split(encoded.numbers, [len(numbers.features)], axis=1)
    return replace(
        sample,
        features=features[:-1] if numbers.features else None,
        labels=labels[1:] if numbers.labels else None,
    )


def _part(encoded: Encoded, start: int, stop: int) -> Encoded:
    numbers = None if encoded.numbers is None else encoded.numbers[start:stop]
    return Encoded(encoded.token_ids[start:stop], encoded.loss_mask[start:stop], numbers)


def _size(encoded: Encoded) -> int:
    return len(encoded.token_ids) - 1


def _truncate(documents: tuple[Encoded, ...], room: int) -> tuple[Encoded, ...]:
    """Keep the beginnings; of a pair, the shorter side is cut only where half the pack is too little for it."""
    shortest = min(map(_size, documents))
    most = max(room // len(documents), room - shortest * (len(documents) - 1))
    return tuple(_part(each, 0, most + 1) for each in documents)


def _split(document: Encoded, room: int) -> list[Encoded]:
    """Pieces that predict every token once: the last token of one is the first that the next one reads."""
    starts = range(0, _size(document), room)
    return [_part(document, at, at + room + 1) for at in starts]


def _too_long(sizes: list[int], room: int) -> str:
    """How many rows are how long, and what to do about it."""
    lengths, longest = np.array(sizes), max(sizes)
    edges = [room // 4, room // 2, room, 2 * room, 4 * room]
    counts = np.bincount(np.searchsorted(edges, lengths), minlength=len(edges) + 1)
    labels = [f"≤{edge}" for edge in edges] + [f">{edges[-1]}"]
    shown = ", ".join(f"{label}: {count}" for label, count in zip(labels, counts, strict=True) if count)
    return (
        f"{int((lengths > room).sum())} of {len(lengths)} rows are longer than a pack of {room} tokens, the longest "
        f"{longest} ({shown}); raise data.pack_tokens where the model holds more, "
        "or choose data.over_long: drop, truncate or split"
    )
