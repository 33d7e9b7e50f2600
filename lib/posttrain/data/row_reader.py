"""Records of one source become the Rows that a recipe wants: format looked up, converted, checked."""

from collections.abc import Mapping
from typing import Any

from posttrain.data.records import Format, check_row, convert, detect
from posttrain.data.types import Row
from posttrain.errors import RowError


class RowReader:
    """A source may mix records; each set of columns is looked at once."""

    def __init__(self, *, wanted: str, format: Format | None = None, role_map: Mapping[str, str] | None = None):
        """
        Args:
            wanted: "conversation", "preference", "prompt", "text", as in records.py.
            format: of every record; None detects it from each record's columns.
        """
        self.wanted, self.format, self.role_map = wanted, format, role_map or {}
        self._formats: dict[frozenset[str], Format] = {}

    def __call__(self, record: Any) -> Row:
        """The checked Row of a record.

        Raises:
            RowError: the record is one, is no mapping, or is not fit.
            DataError: its columns fit no format, or several.
        """
        if isinstance(record, RowError):
            raise record
        if not isinstance(record, dict):
            raise RowError("not_a_record", f"expected a record, got {type(record).__name__}")
        format = self.format or self._detected(record)
        row = convert(record, format, wanted=self.wanted, role_map=self.role_map)
        check_row(row, wanted=self.wanted)
        return row

    def _detected(self, record: dict[str, Any]) -> Format:
        columns = frozenset(column for column in record if record[column] is not None)
        if columns not in self._formats:
            self._formats[columns] = detect(record, wanted=self.wanted).format
        return self._formats[columns]
