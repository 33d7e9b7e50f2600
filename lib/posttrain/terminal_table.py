"""A table on a terminal of any width: side by side where its words fit, else a line a column, so that nothing is cut.

In: a console and a rich table. Out: what a person reads; no number and no word is broken for want of room.
"""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

UNBOUNDED = 10_000
"""Columns of a terminal in which every table fits."""


def print_table(console: Console, table: Table) -> None:
    """Print a table; where words would be broken, each row as its first cell with its columns below."""
    measured = [_widths(console, column) for column in table.columns]
    widths = [most for _, most in measured]
    excess = Measurement.get(console, _unbounded(console), table).maximum - console.width
    for _ in range(excess):
        slack = [i for i, (least, _) in enumerate(measured) if widths[i] > least]
        if not slack:
            _print_turned(console, table)
            return
        widths[max(slack, key=lambda i: widths[i])] -= 1
    if excess > 0:
        for column, width in zip(table.columns, widths, strict=True):
            column.width = width
    console.print(table)


def _unbounded(console: Console):
    return console.options.update(width=UNBOUNDED, max_width=UNBOUNDED)


def _widths(console: Console, column: Column) -> tuple[int, int]:
    """The least width of a column, in which no word is broken and the heading takes two lines, and the one in which
    nothing takes a second line. A cell that stands on the right is a number with its unit: one word."""
    options = _unbounded(console)
    heading = Measurement.get(console, options, column.header)
    cells = [Measurement.get(console, options, cell) for cell in column.cells]
    most = max([heading.maximum, *(cell.maximum for cell in cells)])
    whole = column.no_wrap or column.justify == "right"
    least = max(heading.minimum, -(-heading.maximum // 2))
    return max([least, *(cell.maximum if whole else cell.minimum for cell in cells)]), most


def _print_turned(console: Console, table: Table) -> None:
    headings = [_text(column.header) for column in table.columns]
    for first, *others in zip(*(column.cells for column in table.columns), strict=True):
        name = _text(first).copy()
        name.stylize("bold")
        console.print("", name, sep="\n", end="\n")
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for heading, cell in zip(headings[1:], others, strict=True):
            grid.add_row(Text.assemble("  ", heading), cell)
        console.print(grid)
    console.print()


def _text(cell: object) -> Text:
    return cell if isinstance(cell, Text) else Text.from_markup(str(cell))
