"""How a table of events is written in tokens: which columns, which buckets, which events are trained.

An event is what the service knows before it (`context`), the item that the member takes, and what comes of it
(`outcome`). A member's events are then a conversation: the service speaks as `user`, and the item is the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from posttrain.data.item_tokens import ItemTokens
from posttrain.errors import DataError

SESSION, NEXT, OTHER_ITEM = "<session>", "<next>", "<other_item>"
"""What opens an event: the first of a session, or a further one; and what an item without a name is read as."""

DERIVED = ("hour", "weekday", "gap_minutes")
"""Columns that the time gives: 0 to 23, 0 (Monday) to 6, both UTC, and minutes since the member's event before (inf
for the first)."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """A column that is written as one token: `<device_tv>`, or of a number its bucket, `<hour_2>`.

    Raises:
        DataError: not exactly one of values and edges, or edges that do not ascend.
    """

    column: str
    """Of the table, or one of DERIVED."""
    values: tuple[str, ...] = ()
    """Every value that it may have; another is refused."""
    edges: tuple[float, ...] = ()
    """Ascending; bucket 0 lies below the first, and an edge belongs to the bucket above it."""

    def __post_init__(self):
        if bool(self.values) == bool(self.edges) or list(self.edges) != sorted(set(self.edges)):
            raise DataError(
                f"field {self.column}: values {self.values}, edges {self.edges}; give the values of a category, or "
                "ascending edges of a number"
            )

    @property
    def tokens(self) -> tuple[str, ...]:
        """By code."""
        names = self.values or range(len(self.edges) + 1)
        return tuple(f"<{self.column}_{name}>" for name in names)

    def codes(self, column: pa.ChunkedArray | pa.Array) -> np.ndarray:
        """[N] int64, which of `tokens` each value is; -1 for one that is none of them, or no number."""
        if self.values:
            found = places(column, self.values)
            return np.where(np.isnan(found), -1, found).astype(np.int64)
        numbers = pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False)
        return np.where(np.isnan(numbers), -1, np.searchsorted(self.edges, numbers, side="right"))


def places(column: pa.ChunkedArray | pa.Array, values: Sequence[str]) -> np.ndarray:
    """[N] float64, which of `values` each of a column is, as text; NaN for one that is none of them."""
    options = pc.SetLookupOptions(value_set=pa.array(values, pa.string()))
    found = pc.call_function("index_in", [pc.cast(column, pa.string())], options)
    return pc.cast(found, pa.float64()).to_numpy(zero_copy_only=False)


@dataclass(frozen=True, kw_only=True)
class EventSchema:
    """What is read of a table with the columns `member`, `time` and `item`, and how it is written.

    Raises:
        DataError: a column among the fields twice.
    """

    items: ItemTokens
    """What an item is written as."""
    context: tuple[Field, ...] = ()
    """Known before the item is taken."""
    outcome: tuple[Field, ...] = ()
    """Known after it."""
    trained: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Column -> values; the item of an event carries loss where all of them fit, as {"action": ("finish",)}."""
    train_outcome: bool = False
    """The outcome belongs to the answer, and carries loss with the item: one model says what is taken, and what comes
    of it."""
    labels: tuple[str, ...] = ()
    """Columns of numbers for heads. Every answer that is to be predicted has them of its event, for `method.heads` of
    SFT; and the row keeps those of its last answer, for `method: {name: reward, kind: ratings, attributes: ...}`."""
    features: tuple[str, ...] = ()
    """Columns of numbers, or of DERIVED, that every answer has as its features, for `method.side` of SFT: known before
    the item is taken."""
    last_features: tuple[str, ...] = ()
    """Columns of numbers that are known after it: an answer has them of the event before, as `last_watch_minutes`."""
    session_minutes: float = 180
    """A longer pause begins a session."""
    max_events: int = 64
    """Of a row. A longer history becomes several, each of whose trained events have at least half as many before
    them."""

    def __post_init__(self):
        names = [each.column for each in (*self.context, *self.outcome)]
        if reserved := {"messages", "member", "items", "asked"}.intersection(self.labels):
            raise DataError(f"labels name {', '.join(sorted(reserved))}, which rows hold already; rename the column")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"the fields name {', '.join(twice)} twice; tokens say what was, not where it stands")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every token that rows may hold; word_tokenizer() makes a tokenizer of it."""
        fields = [token for each in (*self.context, *self.outcome) for token in each.tokens]
        return (SESSION, NEXT, OTHER_ITEM, *fields, *self.items.vocabulary)

    @property
    def numbers(self) -> list[str]:
        """Columns of a table that are read as numbers."""
        derived = [name for name in self.features if name not in DERIVED]
        return list(dict.fromkeys([*self.labels, *derived, *self.last_features]))

    @property
    def columns(self) -> list[str]:
        """Those that a table must have."""
        fields = [each.column for each in (*self.context, *self.outcome) if each.column not in DERIVED]
        return list(dict.fromkeys(["member", "time", "item", *fields, *self.trained, *self.numbers]))
