"""A reward that compares numbers, exactly: as fractions, not as floats."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.data.types import Row

BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\}){0,200})\}")
LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([^{}]{1,60}?)\s*\}\s*\{\s*([^{}]{1,60}?)\s*\}")
DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,60})(?:\.\d{1,60})?|\.\d{1,60}"
NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>[-+−]?)\s?(?:\\?\$)?(?P<top>{DIGITS})(?:[eE](?P<power>[-+]?\d{{1,3}})(?!\w))?"
    rf"(?:\s?/\s?(?P<bottom>{DIGITS}))?\s?(?P<percent>\\?%)?"
)
"""Commas between thousands, a sign, a currency sign, a power of ten, a denominator, a percent sign."""


def numeric(row: Row, completion: str) -> float:
    """1 where the last number of the completion, or of its last \\boxed{}, is the number in the row's `answer`.

    "1,234.50", "-3/4", "\\frac{3}{4}", "$5" and "2e3" are read as numbers. "50%" is 1/2, and also 50 where the other
    side has no percent sign. The row's `tolerance`, relative to the answer, is 0 where it has none.

    Raises:
        KeyError, ValueError: the row has no `answer`, or there is no number in it.
    """
    wanted = last_number(str(row["answer"]))
    if wanted is None:
        raise ValueError(f"there is no number in the answer {row['answer']!r:.80}")
    found = last_number(completion)
    if found is None:
        return 0.0
    room = Fraction(row.get("tolerance", 0)) * abs(wanted[0])
    return float(any(abs(a - b) <= room for a, b in _readings(found, wanted)))


def last_number(text: str) -> tuple[Fraction, bool] | None:
    """The number a text ends up with, and whether a percent sign follows it (the number is before its division by
    100). None where there is none."""
    boxes = BOXED.findall(text)
    plain = LATEX_FRACTION.sub(r" \1/\2 ", boxes[-1] if boxes else text)
    plain = re.sub(r"([-+−])\s+(?=\d+/\d)", r"\1", plain)
    for match in reversed(list(NUMBER.finditer(plain))):
        if (number := _number(match)) is not None:
            return number, match["percent"] is not None
    return None


def _number(match: re.Match[str]) -> Fraction | None:
    top = Fraction(match["top"].replace(",", ""))
    bottom = Fraction((match["bottom"] or "1").replace(",", ""))
    if bottom == 0:
        return None
    sign = -1 if match["sign"] in ("-", "−") else 1
    return sign * top * Fraction(10) ** int(match["power"] or 0) / bottom


def _readings(found: tuple[Fraction, bool], wanted: tuple[Fraction, bool]) -> list[tuple[Any, Any]]:
    (a, a_percent), (b, b_percent) = found, wanted
    if a_percent == b_percent:
        return [(a, b)]
    return [(a, b), (a / 100, b) if a_percent else (a, b / 100)]
