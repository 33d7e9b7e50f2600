"""Plots of the documentation, as small SVG files: they read in light and dark pages, and need no library."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#2f6fde", "#e8762c", "#2f9e6e", "#9a55b8", "#c9414b", "#8a939f")
WIDTH, HEIGHT = 680, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 48, 40
"""Room around what is drawn, for labels."""
LETTER = 6.6
"""Width of a letter of a legend, pixels."""
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.title{font-weight:600;font-size:13px}"
    ".grid{stroke:#8884;stroke-width:1}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve: (x, y) in order of x."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One horizontal bar of pieces side by side: (name, length)."""

    label: str
    pieces: Sequence[tuple[str, float]]
    marks: Sequence[float] = ()
    """Single values, as dots."""


def line_plot(title: str, lines: Sequence[Line], *, x: str, y: str, top: float | None = None) -> str:
    """An SVG of curves from zero; `x` and `y` are axis titles with their units."""
    xs = [point[0] for line in lines for point in line.points]
    low, high = min(xs), max(xs)
    most = top or max(point[1] for line in lines for point in line.points)
    rows = _legend_rows([line.label for line in lines])
    bottom = HEIGHT - BOTTOM - 18 * len(rows)

    def at(px: float, py: float) -> tuple[float, float]:
        across = LEFT + (px - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT)
        return across, bottom - py / most * (bottom - TOP)

    drawn = _grid([at(low, value)[1] for value in _ticks(most)], [f"{value:g}" for value in _ticks(most)])
    for value in _ticks(high):
        if value >= low:
            drawn.append(_text(at(value, 0)[0], bottom + 16, f"{value:g}", "middle"))
    drawn.append(_text((LEFT + WIDTH - RIGHT) / 2, bottom + 32, x, "middle"))
    drawn.append(_text(LEFT, TOP - 8, y, "start"))
    for line in lines:
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in (at(*point) for point in line.points))
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2"{dash}/>')
        for across, down in (at(*point) for point in line.points if line.dots):
            drawn.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3" fill="{line.colour}"/>')
    for n, row in enumerate(rows):
        down, across = bottom + 52 + 18 * n, float(LEFT)
        for place in row:
            line = lines[place]
            dash = ' stroke-dasharray="6 4"' if line.dashed else ""
            drawn.append(
                f'<path d="M{across:.0f} {down - 4}h22" stroke="{line.colour}" stroke-width="2" fill="none"{dash}/>'
            )
            drawn.append(_text(across + 28, down, line.label, "start"))
            across += 44 + LETTER * len(line.label)
    return _svg(title, drawn, HEIGHT)


def bar_plot(title: str, bars: Sequence[Bar], *, x: str, top: float | None = None) -> str:
    """An SVG of horizontal bars from zero, one colour a piece; `x` is the axis title with its unit."""
    most = top or max(sum(length for _, length in bar.pieces) for bar in bars)
    names = list(dict.fromkeys(name for bar in bars for name, _ in bar.pieces))
    room = 10 + LETTER * max(len(bar.label) for bar in bars)
    scale = (WIDTH - room - RIGHT - 48) / most
    drawn, down = [], 34.0
    for bar in bars:
        across = room
        for name, length in bar.pieces:
            colour = COLOURS[names.index(name) % len(COLOURS)]
            drawn.append(
                f'<rect x="{across:.1f}" y="{down}" width="{length * scale:.1f}" height="16" fill="{colour}"/>'
            )
            across += length * scale
        for value in bar.marks:
            drawn.append(f'<circle cx="{room + value * scale:.1f}" cy="{down + 8}" r="3" fill="#fff" stroke="#333"/>')
        drawn.append(_text(room - 6, down + 12, bar.label, "end"))
        furthest = max([across, *(room + value * scale + 4 for value in bar.marks)])
        drawn.append(_text(furthest + 6, down + 12, f"{sum(length for _, length in bar.pieces):.3g}", "start"))
        down += 24
    drawn.append(_text((room + WIDTH - RIGHT) / 2, down + 14, x, "middle"))
    down += 20
    if len(names) > 1:
        for row in _legend_rows(names):
            down, across = down + 18, room
            for place in row:
                colour = COLOURS[place % len(COLOURS)]
                drawn.append(f'<rect x="{across:.0f}" y="{down - 10}" width="12" height="12" fill="{colour}"/>')
                drawn.append(_text(across + 18, down, names[place], "start"))
                across += 38 + LETTER * len(names[place])
    return _svg(title, drawn, round(down) + 12)


def _legend_rows(labels: Sequence[str]) -> list[list[int]]:
    """Places of labels, as many to a row as there is room for."""
    rows, used = [[]], 0.0
    for place, label in enumerate(labels):
        width = 44 + LETTER * len(label)
        if rows[-1] and used + width > WIDTH - LEFT - RIGHT:
            rows, used = [*rows, []], 0.0
        rows[-1].append(place)
        used += width
    return rows


def _ticks(most: float) -> list[float]:
    """Some round numbers from 0 to `most`."""
    step = next(size for power in range(-6, 9) for size in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
                if most / size <= 6)  # fmt: skip
    return [step * n for n in range(int(most / step + 1e-9) + 1)]


def _grid(downs: Sequence[float], labels: Sequence[str]) -> list[str]:
    found = []
    for down, label in zip(downs, labels, strict=True):
        found.append(f'<path class="grid" d="M{LEFT} {down:.1f}H{WIDTH - RIGHT}"/>')
        found.append(_text(LEFT - 8, down + 4, label, "end"))
    return found


def _text(across: float, down: float, text: str, anchor: str) -> str:
    return f'<text x="{across:.1f}" y="{down:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, drawn: Sequence[str], height: int) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    name = (
        f'<title>{escape(title)}</title><style>{STYLE}</style><text class="title" x="8" y="16">{escape(title)}</text>'
    )
    return "\n".join([head, name, *drawn, "</svg>"]) + "\n"
