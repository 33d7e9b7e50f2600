"""Records of one source become the Rows that a recipe wants: format looked up, converted, checked."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from posttrain.data.record_checks import question_hash, question_key
from posttrain.data.records import Format, check_row, convert, detect
from posttrain.data.types import Row
from posttrain.errors import DataError, RowError


class RowReader:
    """A source may mix records; each set of columns is looked at once."""

    def __init__(
        self,
        *,
        wanted: str,
        format: Format | None = None,
        role_map: Mapping[str, str] | None = None,
        held_out: frozenset[bytes] = frozenset(),
        keep: Sequence[str] = (),
    ):
        """
        Args:
            wanted: "conversation", "preference", "prompt", "text", as in records.py.
            format: of every record; None detects it from each record's columns.
            held_out: hashes, by question_hash(), of the questions that no row may ask.
            keep: columns of the record that its row has too, where they are not null; the others go.
        """
        self.wanted, self.format, self.role_map = wanted, format, role_map or {}
        self.held_out, self.keep = held_out, keep
        self._formats: dict[Hashable, Format] = {}

    def __call__(self, record: Any) -> Row:
        """The checked Row of a record.

        Raises:
            RowError: the record is one, is no mapping, has columns that fit no format or several
                (`unknown_format`), or is not fit.
            DataError: it repeats a held-out question, which no budget of bad rows allows; or `format` cannot be
                what is wanted.
        """
        if isinstance(record, RowError):
            raise record
        if not isinstance(record, dict):
            raise RowError("not_a_record", f"expected a record, got {type(record).__name__}")
        format = self.format or self._detected(record)
        try:
            row = convert(record, format, wanted=self.wanted, role_map=self.role_map)
            check_row(row, wanted=self.wanted)
        except RecursionError:
            raise RowError("wrong_schema", "its columns are nested hundreds of levels deep; flatten them") from None
        row |= {name: record[name] for name in self.keep if name not in row and record.get(name) is not None}
        if self.held_out and question_hash(row) in self.held_out:
            raise DataError(
                f"repeats a held-out question, {question_key(row)[:120]!r}; a score on what was trained says nothing. "
                "Fix: remove the row from this source, or the question from data.held_out"
            )
        return row

    def _detected(self, record: dict[str, Any]) -> Format:
        # of a label detect() also looks at the type: a true or false one says which answers are bad
        looks = frozenset(column for column in record if record[column] is not None), type(record.get("label"))
        if looks not in self._formats:
            try:
                self._formats[looks] = detect(record, wanted=self.wanted).format
            except DataError as error:
                raise RowError("unknown_format", str(error)) from None
        return self._formats[looks]
