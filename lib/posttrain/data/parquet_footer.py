"""Where the row groups of a Parquet file lie, read from its footer without pyarrow.

pyarrow's own way there, RowGroupMetaData.column(), ends the process where a column's statistics do not add up: the
error of its C++ part has nobody to catch it (pyarrow 26; found by tests/coverage_guided.py). To read such a row
group is an ordinary error.

The footer is a Thrift struct in the compact protocol (thrift-compact-protocol.md); the numbers of fields are those of
parquet.thrift of the format's specification.
"""

from collections.abc import Callable, Mapping

ROW_GROUPS = 4  # of FileMetaData
COLUMNS = 1  # of RowGroup
META_DATA = 3  # of ColumnChunk
COMPRESSED, DATA_PAGE, DICTIONARY_PAGE = 7, 9, 11  # of ColumnMetaData
DEEPEST = 32
"""Structs within structs; the format has nine."""

Reader = Callable[[int], int]
"""(place of a value) -> the place behind it."""
NOTHING: Mapping[int, Reader] = {}
_STOP, _TRUE, _FALSE, _BINARY, _STRUCT = 0, 1, 2, 8, 12
_READ = (4, 5, 6, 9, 12)
"""Types of what is read: integers, lists, structs."""
_INTEGERS = (4, 5, 6)
_SIZES = {3: 1, 7: 8}
"""Bytes of a byte and of a double."""


def row_group_ranges(footer: bytes) -> list[tuple[int, int]]:
    """(offset, length) in bytes of every row group, in order; (0, 0) of one without columns.

    Args:
        footer: from the first byte of the metadata on.

    Raises:
        ValueError: it is no footer.
    """
    ranges: list[tuple[int, int]] = []
    try:
        _struct(footer, 0, {ROW_GROUPS: lambda at: _list(footer, at, 1, lambda at: _group(footer, at, ranges))})
    except IndexError:
        raise ValueError("the footer ends within a field") from None
    return ranges


def _group(data: bytes, at: int, ranges: list[tuple[int, int]]) -> int:
    first: list[int] = []
    lengths: list[int] = []

    def meta(at: int) -> int:
        found: dict[int, int] = {}

        def note(number: int) -> Reader:
            def read(at: int) -> int:
                found[number], at = _integer(data, at)
                return at

            return read

        at = _struct(data, at, {number: note(number) for number in (COMPRESSED, DATA_PAGE, DICTIONARY_PAGE)})
        first.append(found.get(DICTIONARY_PAGE) or found.get(DATA_PAGE, 0))
        lengths.append(found.get(COMPRESSED, 0))
        return at

    at = _struct(data, at, {COLUMNS: lambda at: _list(data, at, 2, lambda at: _struct(data, at, {META_DATA: meta}))})
    ranges.append((min(first, default=0), sum(lengths)))
    return at


def _struct(data: bytes, at: int, readers: Mapping[int, Reader] = NOTHING, depth: int = 0) -> int:
    """Go through a struct; a field that has a reader is read by it, others are passed over. The place behind it."""
    number = 0
    while (head := data[at]) != _STOP:
        at += 1
        kind = head & 15
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(data, at)
        if (reader := readers.get(number)) is None:
            at = _after(data, at, kind, depth)
        elif kind in _READ:
            at = reader(at)
        else:
            raise ValueError(f"the footer has a value of type {kind} in field {number}")
    return at + 1


def _after(data: bytes, at: int, kind: int, depth: int, *, in_list: bool = False) -> int:
    """The place behind a value."""
    if kind in _INTEGERS:
        while data[at] & 128:
            at += 1
        return at + 1
    if kind == _BINARY:
        size, at = _varint(data, at)
        return at + size
    if kind in _SIZES:
        return at + _SIZES[kind]
    if kind in (_TRUE, _FALSE):
        return at + in_list  # a field of truth is its type
    return _after_nested(data, at, kind, depth + 1)


def _after_nested(data: bytes, at: int, kind: int, depth: int) -> int:
    if depth > DEEPEST:
        raise ValueError(f"the footer nests more than {DEEPEST} deep")
    match kind:
        case 9 | 10:  # a list, a set
            return _list(data, at, depth)
        case 11:  # a map
            return _map_end(data, at, depth)
        case 12:  # a struct
            return _struct(data, at, NOTHING, depth)
        case _:
            raise ValueError(f"the footer has a value of type {kind}, which is none")


def _list(data: bytes, at: int, depth: int, reader: Reader | None = None) -> int:
    """Go through a list, of structs where there is a reader; the place behind it."""
    head, at = data[at], at + 1
    size, kind = head >> 4, head & 15
    if size == 15:
        size, at = _varint(data, at)
    if reader is not None and size and kind != _STRUCT:
        raise ValueError(f"the footer has a list of type {kind} where structs should be")
    for _ in range(size):
        at = _after(data, at, kind, depth, in_list=True) if reader is None else reader(at)
        if at > len(data):
            raise IndexError
    return at


def _map_end(data: bytes, at: int, depth: int) -> int:
    size, at = _varint(data, at)
    if not size:
        return at
    kinds = data[at]
    at += 1
    for _ in range(size):
        for kind in (kinds >> 4, kinds & 15):
            at = _after(data, at, kind, depth, in_list=True)
            if at > len(data):
                raise IndexError
    return at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned number of seven bits a byte, the lowest first, and the place behind it."""
    value, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("the footer has a number of more than 64 bits")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    """A signed number, zigzag: 0, -1, 1, -2 ... as 0, 1, 2, 3 ..."""
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at
