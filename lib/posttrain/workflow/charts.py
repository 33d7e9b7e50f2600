"""The charts of the cards: metrics in, Vega-Lite specs out, as plain JSON values.

Nothing here knows Metaflow. A refresh of a card rewrites all its charts, so long runs
are thinned to what a screen can show, and values that JSON cannot carry (NaN, infinity)
are left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Metrics = dict[str, float]
Point = tuple[int, float]
"""Optimizer step, counted from 1, and the value there."""
Scale = Literal["zero", "data", "share"]
"""What a value axis shows: from zero, only where the data are, or all of [0, 1] if they lie there."""

BLUE, ORANGE, GREEN, PURPLE, GREY, PALE = "#2f6fde", "#e8762c", "#2f9e6e", "#9a55b8", "#a3abb6", "#9dbcf3"
YELLOW, RED = "#d9a400", "#c9414b"
COLOURS = [BLUE, ORANGE, GREEN, PURPLE, GREY]
"""Training is blue and held-out rows are orange on every card."""
SOURCE_COLOURS = [BLUE, GREEN, PURPLE, YELLOW, RED, ORANGE]
MAX_POINTS = 400
"""Points of a line: about one per pixel of the narrower charts."""
MAX_BARS, NARROWEST = 60, 340
"""Bars of a chart; pixels of its width on a telephone."""


@dataclass(frozen=True, slots=True)
class Line:
    """One metric over the steps."""

    metric: str
    label: str
    colour: str = BLUE
    mean_of: int = 1
    """Steps of the trailing mean that is drawn instead of the value."""
    dots: bool = False
    """Mark every value: for what is measured rarely."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart: its title, the y axis with its unit, and its lines."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    scale: Scale = "zero"
    height: int = 260
    """Pixels, title and legend included."""


def line_chart(chart: Chart, rows: Sequence[Metrics]) -> dict[str, Any] | None:
    """Every line that has values, or None when no line has any."""
    drawn = [(line, found) for line in chart.lines if (found := points(line, rows))]
    if not drawn:
        return None
    layers = []
    for line, found in drawn:
        mark = {"type": "line", "strokeWidth": 1.25 if line.colour == PALE else 2}
        if line.dots or len(found) == 1:
            mark["point"] = {"size": 45, "filled": True}
        values = [{"step": step, "value": value} for step, value in found]
        layers.append({"data": {"values": values}, "mark": mark, "encoding": {"color": {"datum": line.label}}})
    values = [value for _, found in drawn for _, value in found]
    scale = value_scale(values, chart.scale)
    y: dict[str, Any] = {"field": "value", "type": "quantitative", "title": chart.unit, "scale": scale}
    if max(map(abs, values)) < 1e-3:
        y["axis"] = {"format": "~g"}
    colours = {"domain": [line.label for line, _ in drawn], "range": [line.colour for line, _ in drawn]}
    encoding = {
        "x": {"field": "step", **_step_axis(rows)},
        "y": y,
        "color": {"type": "nominal", "scale": colours, **_legend(colours["domain"])},
        "tooltip": [{"field": "step", "type": "quantitative"}, {"field": "value", "type": "quantitative"}],
    }
    return _spec(chart.title, {"height": chart.height, "encoding": encoding, "layer": layers})


def time_chart(rows: Sequence[Metrics], phases: dict[str, str]) -> dict[str, Any] | None:
    """Seconds of every phase of a step (phase -> colour), stacked, and what no phase accounts for.

    Long runs are drawn as means of consecutive steps, so that no slow step is lost.
    """
    if not any("time/step_s" in row for row in rows):
        return None
    width = -(-len(rows) // MAX_BARS)
    values = []
    for start in range(0, len(rows), width):
        some = rows[start : start + width]
        seconds = {phase: _mean(some, f"time/{phase}_s") for phase in phases}
        seconds["other"] = max(0.0, _mean(some, "time/step_s") - sum(seconds.values()))
        span = {"from": int(some[0]["step"]), "to": int(some[-1]["step"]) + 1}
        values += [
            {**span, "phase": phase.replace("_", " "), "seconds": _short(s), "order": order}
            for order, (phase, s) in enumerate(seconds.items())
        ]
    names = [*(phase.replace("_", " ") for phase in phases), "other"]
    colours = {"domain": names, "range": [*phases.values(), GREY]}
    unit = "seconds" if width == 1 else f"seconds, mean of {width} steps"
    encoding = {
        "x": {"field": "from", "bin": {"binned": True, "step": width}, **_step_axis(rows)},
        "x2": {"field": "to"},
        "y": {"field": "seconds", "type": "quantitative", "title": unit, "stack": True},
        "color": {"field": "phase", "type": "nominal", "scale": colours, **_legend(names)},
        "order": {"field": "order", "type": "quantitative"},
        "tooltip": [{"field": "phase", "type": "nominal"}, {"field": "seconds", "type": "quantitative"}],
    }
    mark = {"type": "bar", "binSpacing": 1 if len(rows) < MAX_BARS else 0}
    return _spec("Where a step's time goes", {"data": {"values": values}, "mark": mark, "encoding": encoding})


def bar_chart(title: str, unit: str, bars: dict[str, dict[str, float]]) -> dict[str, Any]:
    """One bar per measure and model (model -> measure -> value), models beside each other."""
    values = [
        {"model": model, "measure": measure, "value": _short(value)}
        for model, measures in bars.items()
        for measure, value in measures.items()
        if math.isfinite(value)
    ]
    models = list(bars)
    scale = value_scale([float(bar["value"]) for bar in values], "share")
    if "domain" not in scale:
        scale["zero"] = True  # a bar that does not start at zero misleads
    colours = {"domain": models, "range": [GREY, *COLOURS[: len(models) - 1]]}
    encoding = {
        "y": {"field": "measure", "type": "nominal", "title": "measure", "sort": None},
        "yOffset": {"field": "model", "type": "nominal", "sort": models},
        "x": {"field": "value", "type": "quantitative", "title": unit, "scale": scale, "axis": {"tickCount": 6}},
        "color": {"field": "model", "type": "nominal", "scale": colours, **_legend(models)},
    }
    label = {"type": "text", "align": "left", "baseline": "middle", "dx": 5, "fontSize": 12, "fill": "#333333"}
    number = {"text": {"field": "value", "type": "quantitative", "format": ".3f"}}
    layers = [{"mark": {"type": "bar"}}, {"mark": label, "encoding": number}]
    height = 90 + 22 * len(values)  # so that the numbers beside the bars do not touch
    return _spec(title, {"height": height, "data": {"values": values}, "encoding": encoding, "layer": layers})


def interval_chart(title: str, unit: str, gain: float, interval: tuple[float, float], margin: float) -> dict[str, Any]:
    """A gain as a dot on its interval, and the margin that it must be above as a line."""
    low, high = interval
    axis = {"type": "quantitative", "title": unit, "scale": {"zero": False, "nice": True}, "axis": {"tickCount": 7}}

    def layer(mark: dict[str, Any], values: dict[str, float], **more: Any) -> dict[str, Any]:
        x = {"field": next(iter(values)), **axis}
        data = {"values": [{name: _short(value) for name, value in values.items()}]}
        return {"data": data, "mark": mark, "encoding": {"x": x, **more}}

    side = {"align": "left", "dx": 5} if margin <= gain else {"align": "right", "dx": -5}  # away from the interval
    layers = [
        layer({"type": "rule", "strokeWidth": 4, "color": PALE}, {"low": low, "high": high}, x2={"field": "high"}),
        layer({"type": "point", "filled": True, "size": 120, "color": BLUE}, {"gain": gain}),
        layer({"type": "rule", "strokeDash": [5, 4], "color": RED}, {"margin": margin}),
        layer({"type": "text", "y": 6, "color": RED, **side}, {"margin": margin}, text={"value": f"margin {margin:g}"}),
    ]
    return _spec(title, {"height": 130, "layer": layers})


def source_colour(number: int) -> str:
    """The colour of data.sources[number] wherever it is drawn; those after the sixth are grey."""
    return SOURCE_COLOURS[number] if number < len(SOURCE_COLOURS) else GREY


def length_chart(title: str, sources: dict[str, dict[str, list[int]]], pack_tokens: int) -> dict[str, Any] | None:
    """How long units are (source -> edges and counts), with the length of a pack; None when there are no units.

    Shares of each source, so that a small source can be seen beside a large one.
    """
    layers, ends = [], [pack_tokens]
    for name, lengths in sources.items():
        edges, counts, total = lengths["edges"], lengths["counts"], sum(lengths["counts"])
        if not total:
            continue
        full = [i for i, count in enumerate(counts) if count]
        first, last = full[0], full[-1] + 1
        values = [
            {"tokens": max(1, edge), "share": _short(count / total), "units": count}  # a logarithm has no zero
            for edge, count in zip(edges[first : last + 1], [*counts[first:last], counts[last - 1]], strict=True)
        ]
        ends += [values[0]["tokens"], values[-1]["tokens"]]
        mark = {"type": "area", "interpolate": "step-after", "line": {"strokeWidth": 2}, "fillOpacity": 0.15}
        layers.append({"data": {"values": values}, "mark": mark, "encoding": {"color": {"datum": name}}})
    if not layers:
        return None
    scale = {"type": "log", "base": 2, "domain": [min(ends), max(ends)], "nice": False}
    x = {
        "field": "tokens",
        "type": "quantitative",
        "title": "tokens of a unit",
        "scale": scale,
        "axis": {"format": ",d"},
    }
    y = {"field": "share", "type": "quantitative", "title": "share of the source's units", "stack": None}
    colours = {"domain": list(sources), "range": [source_colour(i) for i in range(len(sources))]}
    colour = {"type": "nominal", "scale": colours, **_legend(colours["domain"])}
    for layer in layers:
        layer["encoding"] = {
            "x": x,
            "y": {**y, "axis": {"format": "~%"}},
            "color": {**layer["encoding"]["color"], **colour},
            "tooltip": [{"field": name, "type": "quantitative"} for name in ("tokens", "units", "share")],
        }
    limit = {"data": {"values": [{"tokens": pack_tokens, "says": f"a pack: {pack_tokens:,}"}]}}
    rule = {"type": "rule", "strokeDash": [4, 4], "color": "#5b6470"}
    says = {"type": "text", "align": "right", "baseline": "top", "dx": -5, "y": 4, "color": "#5b6470"}
    layers.append({**limit, "mark": rule, "encoding": {"x": x}})
    layers.append({**limit, "mark": says, "encoding": {"x": x, "text": {"field": "says", "type": "nominal"}}})
    return _spec(title, {"layer": layers})


def points(line: Line, rows: Sequence[Metrics]) -> list[Point]:
    """What a line draws: finite values, averaged when the line asks for it, thinned."""
    found = [(int(row["step"]) + 1, row[line.metric]) for row in rows if math.isfinite(row.get(line.metric, math.nan))]
    if line.mean_of > 1:
        if len(found) <= line.mean_of:
            return []
        found = _trailing_mean(found, line.mean_of)
    return [(step, _short(value)) for step, value in thinned(found)]


def thinned(found: Sequence[Point]) -> list[Point]:
    """Every k-th point and the last one, at most MAX_POINTS + 1 in all."""
    stride = max(1, -(-len(found) // MAX_POINTS))
    return [point for i, point in enumerate(found) if i % stride == 0 or i == len(found) - 1]


def value_scale(values: Sequence[float], kind: Scale) -> dict[str, Any]:
    """The range of a value axis. Small shares and rewards outside [0, 1] get the range that they need."""
    if kind == "share" and values and min(values) >= 0 and max(values) <= 1:
        return {"domain": [0, 1]} if max(values) > 0.2 else {"zero": True, "nice": True}
    return {"zero": kind == "zero", "nice": True}


def _step_axis(rows: Sequence[Metrics]) -> dict[str, Any]:
    """One x axis for all charts of a card, so that they can be read across; at most ten round ticks."""
    last = int(rows[-1]["step"]) + 1
    size = 10 ** math.floor(math.log10(last))
    gap = next(gap for gap in (size // 10, size // 5, size // 2, size) if gap and last // gap <= 10)
    return {
        "type": "quantitative",
        "title": "optimizer step",
        "scale": {"domain": [0, last], "nice": False},
        "axis": {"values": list(range(0, last + 1, gap)), "format": ",d", "labelFlush": False},
    }


def _trailing_mean(found: Sequence[Point], window: int) -> list[Point]:
    """The mean of the last `window` values, of fewer at the start."""
    total, means = 0.0, []
    for i, (step, value) in enumerate(found):
        total += value - (found[i - window][1] if i >= window else 0.0)
        means.append((step, total / min(i + 1, window)))
    return means


def _mean(rows: Sequence[Metrics], name: str) -> float:
    values = [row[name] for row in rows if math.isfinite(row.get(name, math.nan))]
    return sum(values) / len(rows)


def _short(value: float) -> float:
    """Six digits are more than a screen shows."""
    return float(f"{value:.6g}")


def _legend(labels: Sequence[str]) -> dict[str, Any]:
    """A legend of two labels and more above the chart, in as many columns as a telephone has room for."""

    def width(columns: int) -> float:  # each as wide as its longest label, about 6.2 pixels a character, and its symbol
        return sum(6.2 * max(map(len, labels[column::columns])) + 32 for column in range(columns))

    across = next((n for n in range(len(labels), 1, -1) if width(n) <= NARROWEST), 1)
    shown = {"orient": "top", "direction": "horizontal", "columns": across}
    return {"title": None, "legend": shown if len(labels) > 1 else None}


def _spec(title: str, body: dict[str, Any]) -> dict[str, Any]:
    """The look that all charts share. They fill the width they are given; titles and legends fit in the height."""
    quiet = {"labelColor": "#5b6470", "titleColor": "#5b6470", "titleFontWeight": "normal", "titleFontSize": 12}
    bare = {"ticks": False, "labelPadding": 5}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "title": {"text": title, "anchor": "start", "fontSize": 15, "color": "#1f2733", "offset": 8},
        "width": "container",
        "height": 260,
        "autosize": {"type": "fit", "contains": "padding"},
        **body,
        "config": {
            "font": "Roboto, 'Segoe UI', 'Helvetica Neue', sans-serif",
            "view": {"stroke": None},
            "axis": {**quiet, "labelFontSize": 11, "gridColor": "#eceef1", "domainColor": "#c4c9d0", **bare},
            "legend": {"labelColor": "#3a424e", "labelFontSize": 12, "symbolSize": 90, "offset": 6},
        },
    }
