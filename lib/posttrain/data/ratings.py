"""Ratings of an answer: numbers in columns of its row, of which it may lack some (as HelpSteer's, arXiv:2311.09528)."""

import math
from collections.abc import Sequence
from numbers import Real

from posttrain.data.types import Row
from posttrain.errors import RowError


def ratings_of(row: Row, attributes: Sequence[str]) -> dict[str, float]:
    """The number of every attribute; NaN where the row has none.

    Raises:
        RowError: bad_rating, where one is no finite number or all are missing.
    """
    found = {}
    for name in attributes:
        value = row.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value)):
            raise RowError("bad_rating", f"{name} is {value!r:.80}; a rating is a finite number, or null")
        found[name] = math.nan if value is None else float(value)
    if all(map(math.isnan, found.values())):
        raise RowError("bad_rating", f"none of {', '.join(attributes)} has a number; fill one, or drop the row")
    return found
