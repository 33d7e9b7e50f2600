"""Which slice of an evaluation a held-out row belongs to: the value of one column that the config names."""

from collections.abc import Sequence

from posttrain.data.types import Row
from posttrain.errors import DataError

MOST_SLICES = 50
"""Of one evaluation: a column with more values is an id or a text, and no slice would hold enough rows to say much."""


def slice_of(row: Row, column: str) -> str:
    """The slice of one row."""
    return str(row[column])


def slices_of(rows: Sequence[Row], column: str) -> list[str]:
    """The slice of every held-out row, in order.

    Raises:
        DataError: a row lacks the column, its value is no name, or there are more than MOST_SLICES.
    """
    for number, row in enumerate(rows):
        if not isinstance(row.get(column), str | int):
            raise DataError(
                f"eval.slice_by: {column!r} of data.held_out, row {number}, is {row.get(column)!r:.80}; a slice is a "
                "string, a whole number, true or false. Fix: fill the column in every row, or name another"
            )
    names = [slice_of(row, column) for row in rows]
    if len(set(names)) > MOST_SLICES:
        raise DataError(
            f"eval.slice_by: {column!r} has {len(set(names))} values in data.held_out, more than {MOST_SLICES}. "
            "Fix: name a column that few kinds of rows share"
        )
    return names
