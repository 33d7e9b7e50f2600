"""What a source came to: rows read, units and tokens made, drops by reason. Parts are counted apart and added."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from posttrain.data.encode import CHOSEN_DROPS
from posttrain.data.types import Unit
from posttrain.errors import DataError, RowError

EXAMPLES = 3
"""Bad rows that are quoted; the others are only counted."""


@dataclass(slots=True)
class Counts:
    """Of one source, or of a part of it."""

    rows: int = 0
    units: int = 0
    tokens: int = 0
    loss_tokens: float = 0.0
    unknown_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> rows."""
    examples: list[str] = field(default_factory=list)
    """File, row and fault of the first bad rows."""

    def add(self, found: Sequence[Unit] | RowError, *, unknown_id: int | None) -> None:
        """Count what one row came to."""
        self.rows += 1
        if isinstance(found, RowError):
            self.dropped[found.reason] += 1
            line = f"{found.detail[:600]} ({found.reason})"
            if len(self.examples) < EXAMPLES and found.reason not in CHOSEN_DROPS and line not in self.examples:
                self.examples.append(line)  # once: a small source is drawn again and again
            return
        for unit in found:
            self.units += 1
            self.tokens += sum(map(len, unit))
            self.loss_tokens += sum(float(sample.loss_mask.sum(dtype=np.float64)) for sample in unit)
            if unknown_id is not None:
                self.unknown_tokens += sum(int((sample.target_ids == unknown_id).sum()) for sample in unit)

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"dropped": dict(self.dropped)}

    @staticmethod
    def total(parts: Sequence[Mapping[str, Any]]) -> "Counts":
        """The sum of several plain() values."""
        found = Counts()
        for part in parts:
            for name in ("rows", "units", "tokens", "loss_tokens", "unknown_tokens"):
                setattr(found, name, getattr(found, name) + part[name])
            found.dropped.update(part["dropped"])
            found.examples += [line for line in part["examples"] if line not in found.examples]
        del found.examples[EXAMPLES:]
        return found


def check_budget(counts: Sequence[Counts], *, max_bad_rows: int) -> None:
    """Refuse more bad rows than a run may leave out.

    Raises:
        DataError: counts them by reason and quotes the first ones.
    """
    bad = Counter()
    for each in counts:
        bad.update({reason: count for reason, count in each.dropped.items() if reason not in CHOSEN_DROPS})
    if bad.total() > max_bad_rows:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in bad.most_common())
        examples = "; ".join(line for each in counts for line in each.examples)
        raise DataError(
            f"{bad.total():,} bad rows ({listed}), data.max_bad_rows allows {max_bad_rows:,}; mend them, or raise it. "
            f"The first: {examples}"
        )


def check_not_empty(counts: Counts, *, key: str) -> None:
    """Refuse a source of which nothing is left.

    Raises:
        DataError: says how many rows there were and what became of them.
    """
    if not counts.units:
        gone = ", ".join(f"{count:,} {reason}" for reason, count in counts.dropped.most_common())
        raise DataError(f"{key}: none of its {counts.rows:,} rows is left to train on: {gone}")
