"""Where the row groups of a Parquet file lie, read from its footer without pyarrow.

pyarrow's own way there, RowGroupMetaData.column(), ends the process where a column's statistics do not add up: the
error of its C++ part has nobody to catch it (pyarrow 26; found by tests/coverage_guided.py). To read such a row
group is an ordinary error.

The footer is a Thrift struct in the compact protocol (thrift-compact-protocol.md); the numbers of fields are those of
parquet.thrift of the format's specification.
"""

from collections.abc import Iterator

ROW_GROUPS = 4  # of FileMetaData
COLUMNS = 1  # of RowGroup
META_DATA = 3  # of ColumnChunk
COMPRESSED, DATA_PAGE, DICTIONARY_PAGE = 7, 9, 11  # of ColumnMetaData
DEEPEST = 32
"""Structs within structs; the format has nine."""

_STOP, _TRUE, _FALSE, _BINARY = 0, 1, 2, 8
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
    try:
        groups = next((_list(footer, at)[0] for number, kind, at in _fields(footer, 0) if number == ROW_GROUPS), [])
        return [_range(footer, at) for at in groups]
    except IndexError:
        raise ValueError("the footer ends within a field") from None


def _range(data: bytes, group: int) -> tuple[int, int]:
    first, length = [], 0
    for chunk in _of(data, group, COLUMNS):
        for number, _, meta in _fields(data, chunk):
            if number != META_DATA:
                continue
            found = {n: _integer(data, at)[0] for n, kind, at in _fields(data, meta) if kind in _INTEGERS}
            first.append(found.get(DICTIONARY_PAGE) or found.get(DATA_PAGE, 0))
            length += found.get(COMPRESSED, 0)
    return min(first, default=0), length


def _of(data: bytes, struct: int, wanted: int) -> list[int]:
    """Where the elements of a struct's list of structs begin."""
    return next((_list(data, at)[0] for number, _, at in _fields(data, struct) if number == wanted), [])


def _fields(data: bytes, at: int, depth: int = 0) -> Iterator[tuple[int, int, int]]:
    """Number, type and place of each field of the struct that begins at `at`."""
    number = 0
    while (head := data[at]) != _STOP:
        at += 1
        delta, kind = head >> 4, head & 15
        if delta:
            number += delta
        else:
            number, at = _integer(data, at)
        yield number, kind, at
        at = _after(data, at, kind, depth)


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
            return _list(data, at, depth)[1]
        case 11:  # a map
            return _map_end(data, at, depth)
        case 12:  # a struct
            return _end(data, at, depth)
        case _:
            raise ValueError(f"the footer has a value of type {kind}, which is none")


def _end(data: bytes, at: int, depth: int) -> int:
    """The place behind a struct."""
    while (head := data[at]) != _STOP:
        at += 1
        if not head >> 4:
            at = _integer(data, at)[1]
        at = _after(data, at, head & 15, depth)
    return at + 1


def _list(data: bytes, at: int, depth: int = 0) -> tuple[list[int], int]:
    """Where the elements of a list begin, and the place behind it."""
    head, at = data[at], at + 1
    size, kind = head >> 4, head & 15
    if size == 15:
        size, at = _varint(data, at)
    places = []
    for _ in range(size):
        places.append(at)
        at = _after(data, at, kind, depth, in_list=True)
        if at > len(data):
            raise IndexError
    return places, at


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
