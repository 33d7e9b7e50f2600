"""Files of JSON lines: cut into blocks at line ends, and read back line by line. Blank lines do not count."""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.errors import RowError

LINES_BYTES = 2 * 1024 * 1024
"""About the size of a block of lines."""

_NEWLINE, _RETURN = 10, 13

ReadAt = Callable[[int, int], bytes]
"""(offset, length) -> bytes; called from several threads."""


@dataclass(frozen=True, slots=True)
class Lines:
    """A block: whole lines."""

    rows: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _Strip:
    """What LINES_BYTES of a file hold."""

    newlines: int
    cut: int
    """Bytes up to and including the last newline; 0 where there is none."""
    blank: bool
    """A line may be blank, so the lines have to be counted one by one."""


def cut_lines(read_at: ReadAt, size: int) -> list[Lines]:
    """The blocks of a file, in order; reads it once, by as many threads as there are cores."""
    starts = range(0, size, LINES_BYTES)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        strips = list(pool.map(lambda start: _look(read_at(start, LINES_BYTES)), starts))
    blocks, begin, newlines, blank = [], 0, 0, False
    for start, strip in zip(starts, strips, strict=True):
        newlines, blank = newlines + strip.newlines, blank or strip.blank
        last = start + LINES_BYTES >= size
        end = size if last else start + strip.cut
        if not last and not strip.cut:  # within one long line
            continue
        if end > begin:
            rows = newlines
            if blank or last:  # the last line may have no newline
                rows = len(split_lines(read_at(begin, end - begin)))
            blocks.append(Lines(rows, begin, end - begin))
        begin, newlines, blank = end, 0, False
    return blocks


def split_lines(data: bytes) -> list[bytes]:
    """The lines of a block that are not blank."""
    lines = data.split(b"\n")
    if _look(data).blank:
        return [line for line in lines if line not in (b"", b"\r")]
    return lines if lines[-1] else lines[:-1]


def line_number(read_at: ReadAt, block: Lines, row: int) -> int:
    """Line of the file, from 1, of a row of a block; reads the file up to it, so only for errors."""
    before = 0
    for start in range(0, block.offset, LINES_BYTES):
        before += read_at(start, min(LINES_BYTES, block.offset - start)).count(b"\n")
    lines = read_at(block.offset, block.length).split(b"\n")
    return [number for number, line in enumerate(lines, start=before + 1) if line not in (b"", b"\r")][row]


def parse_lines(lines: Sequence[bytes]) -> list[dict[str, Any] | RowError]:
    """Records; a line that is none comes back as the error it is."""
    return [_parse(line) for line in lines]


def _look(data: bytes) -> _Strip:
    """Numpy finds newlines faster than bytes.count(), and lets other threads work meanwhile."""
    values = np.frombuffer(data, np.uint8)
    at = np.flatnonzero(values == _NEWLINE)
    if not len(at):
        return _Strip(0, 0, data[:1] == b"\r")
    gaps = np.diff(at)
    after_return = values[at[1:] - 1] == _RETURN
    blank = data[:1] in (b"\n", b"\r") or data.endswith(b"\n\r")
    blank = blank or bool(((gaps == 1) | ((gaps == 2) & after_return)).any())
    return _Strip(len(at), int(at[-1]) + 1, blank)


def _parse(line: bytes) -> dict[str, Any] | RowError:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        found = line[error.start : error.start + 4].hex(" ")
        return RowError("not_utf8", f"byte {error.start} of the line is not UTF-8 ({found}); save the file as UTF-8")
    except (ValueError, RecursionError) as error:  # not JSON, or a number of too many digits
        shown = line[:80].decode("utf-8", "replace")
        return RowError(
            "not_json", f"not a JSON record: {error}; the line begins {shown!r}. Fix: one whole object a line"
        )
    if not isinstance(record, dict):
        return RowError("not_a_record", f"expected a JSON object, got {type(record).__name__}")
    return record
