"""The data report in a terminal: sources, lengths, trained tokens, packs, as `posttrain preview` prints them.

A report is the plain JSON that the tokenize steps write. Colours are left out where the
console has none: brackets and capitals then tell trained tokens from those only read.
Nothing that came out of a file reaches the terminal as an escape code or as markup.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.terminal_table import print_table
from posttrain.workflow import markup
from posttrain.workflow.charts import source_colour

UNKNOWN_SHARE = 0.01
"""A source with more unknown tokens than this is marked: its text is not what the tokenizer was made for."""
QUANTILES = {"p0": "shortest", "p50": "median", "p90": "90 % up to", "p99": "99 % up to", "p100": "longest"}
"""Key of a source's quantiles -> heading."""
SHOWN_TOKENS = 300
MARKED_CELLS = 3
"""Characters of the narrowest document whose start is marked."""
SOURCES_A_TABLE = 3
"""Histograms beside each other, at most."""
HISTOGRAM_COLUMNS = 22
"""What one of them takes of a terminal, with a little bar and the name of its source; 14 are for what they share."""


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """Print a data report; `console` is where to, standard output when None."""
    console = console or Console()
    coloured = console.color_system is not None and not console.no_color
    fill = report["predicted_fill"]
    filled = [] if fill is None else [f"filled to {fill:.1%}, predicted"]
    _heading(console, "Data", " · ".join([*report_facts(report), *filled]))
    if report["sources"]:
        _print_sources(console, report["sources"])
        _print_lengths(console, report["sources"], report["pack_tokens"])
    if report["preview"]:
        _print_preview(console, report["preview"], coloured=coloured)
    if report["packs"]:
        _print_packs(console, report, coloured=coloured)
    if report["prompts"]:
        rows = [(name.replace("_", " "), *map(found.get, _PROMPTS)) for name, found in report["prompts"].items()]
        _heading(console, "Prompt sets")
        print_table(console, _table(["set", "prompts", "tokens", "longest, tokens"], rows))


def report_facts(report: dict[str, Any]) -> list[str]:
    """What the report is about, in words: the scope of its counts, the tokenizer, the packs."""
    facts = [f"tokenizer {report['tokenizer_sha256'][:16]}"]
    if report["sources"]:
        facts = [f"counts of {report['scope']}", *facts, f"packs of {report['pack_tokens']:,} tokens"]
    return facts


def source_counts(source: dict[str, Any]) -> dict[str, int | str]:
    """Heading -> what a source gave, for its line on the card and in the terminal."""
    return {
        "rows": source["rows"],
        "units": source["units"],
        "tokens": source["tokens"],
        "trained": _percent(source["loss_tokens"] / source["tokens"]) if source["tokens"] else "",
        "share of draws": _percent(source["share"]),
    }


def source_state(source: dict[str, Any]) -> dict[str, str]:
    """Heading -> how a source is drawn and how sound it is."""
    share = source["unknown_tokens"] / source["tokens"] if source["tokens"] else 0.0
    duplicates, epochs = source["duplicates"], source["epochs"]
    return {
        "weight": _schedule(source["weight"]),
        "epochs": "no limit" if epochs is None else f"{epochs:g}",
        "duplicates": "not counted" if duplicates is None else f"{duplicates:,}",
        "unknown tokens": f"⚠ {_percent(share)}" if share > UNKNOWN_SHARE else _percent(share),
    }


def dropped_facts(source: dict[str, Any]) -> list[str]:
    """Reason and count of every kind of dropped row, the most frequent first."""
    found = sorted(source["dropped"].items(), key=lambda item: (-item[1], item[0]))
    return [f"{reason.replace('_', ' ')}: {count:,}" for reason, count in found]


def cells(documents: Sequence[dict[str, Any]], pack_tokens: int, width: int) -> list[tuple[int, bool, bool] | None]:
    """A pack as `width` characters: source, whether trained, whether it is the first of a document that is wide
    enough to lose one to a mark; None where the pack is empty.

    Each is what lies in its middle. The trained tokens of a document are drawn at its end.
    """
    ends = list(accumulate(document["tokens"] for document in documents))
    found: list[tuple[int, bool, bool] | None] = []
    before = -1
    for cell in range(width):
        at = (cell + 0.5) * pack_tokens / width
        i = bisect_right(ends, at)
        if i == len(documents):
            found.append(None)
        else:
            trained = at >= ends[i] - documents[i]["trained"]
            wide = documents[i]["tokens"] * width >= MARKED_CELLS * pack_tokens
            found.append((documents[i]["source"], trained, wide and i != before))
        before = i
    return found


_PROMPTS = ("prompts", "tokens", "longest")


def _print_sources(console: Console, sources: Sequence[dict[str, Any]]) -> None:
    for i, source in enumerate(sources):
        kind = source["format"] or "format by columns"
        where = f"  {_spelled(source['path'])}  ({kind}, {source['fingerprint'][:16]})"
        console.print(Text.assemble((_spelled(source["name"]), f"bold {source_colour(i)}"), where))
    for facts in (source_counts, source_state):
        rows = [(source["name"], *facts(source).values()) for source in sources]
        print_table(console, _table(["source", *facts(sources[0])], rows))
    for source in sources:
        if source["dropped"]:
            reasons = _spelled(", ".join(dropped_facts(source)))
            console.print(Text.assemble((f"{_spelled(source['name'])}: dropped rows", "bold"), f"  {reasons}"))
            for example in source["examples"]:
                console.print(Text(f"  {_spelled(example)}"))


def _print_lengths(console: Console, sources: Sequence[dict[str, Any]], pack_tokens: int) -> None:
    _heading(console, "Lengths of units, tokens", f"A pack holds {pack_tokens:,}.")
    rows = [(source["name"], *map(source["quantiles"].get, QUANTILES)) for source in sources]
    print_table(console, _table(["source", *QUANTILES.values()], rows))
    numbered = list(enumerate(sources))
    beside = min(SOURCES_A_TABLE, max(1, (console.width - 14) // HISTOGRAM_COLUMNS))
    for start in range(0, len(sources), beside):
        _print_histogram(console, numbered[start : start + beside])


def _print_histogram(console: Console, sources: Sequence[tuple[int, dict[str, Any]]]) -> None:
    """A column of bars for each numbered source, to a scale of its own."""
    counts = [dict(zip(s["lengths"]["edges"], s["lengths"]["counts"], strict=False)) for _, s in sources]
    full = [edge for of in counts for edge, count in of.items() if count]
    if not full:
        return
    room = max(4, (console.width - 16) // len(sources) - 14)
    table = Table("from", box=SIMPLE_HEAD)
    for _, source in sources:
        table.add_column(Text(_spelled(source["name"])), overflow="fold")
    for edge in sorted({edge for of in counts for edge in of}):
        if min(full) <= edge <= max(full):
            bars = []
            for (i, _), of in zip(sources, counts, strict=True):
                bar = "█" * round(room * of.get(edge, 0) / max(1, *of.values()))
                bars.append(Text.assemble((bar, source_colour(i)), f" {of.get(edge, 0):,}"))
            table.add_row(f"{edge:,}", *bars)
    console.print(table)


def _print_preview(console: Console, preview: Sequence[dict[str, Any]], *, coloured: bool) -> None:
    shown, note = markup.around_training(preview, SHOWN_TOKENS)
    _heading(console, "One document, token by token", f"Trained tokens are {'blue' if coloured else 'in ⟦ ⟧'}. {note}")
    text = Text()
    for i, token in enumerate(shown):
        said = "".join({" ": "·", "\n": "⏎"}.get(char) or markup.spelled(char) for char in token["token"])
        if coloured:
            # Neighbours differ in shade, so that one sees where a token ends.
            blue = "bold white on #2f6fde" if i % 2 else "bold white on #1f55b5"
            text.append(said, blue if token["trained"] else "" if i % 2 else "dim")
        else:
            text.append(f"⟦{said}⟧" if token["trained"] else said)
        text.append("\n" * ("\n" in token["token"]))
    text.rstrip()
    console.print(text)


def _print_packs(console: Console, report: dict[str, Any], *, coloured: bool) -> None:
    shades = "full where trained, light where only read, · where empty"
    letters = "a letter for each source, capitals where trained, | where a document starts, . where empty"
    _heading(console, "The first packs", f"Width is tokens: {shades if coloured else letters}.")
    for i, source in enumerate(report["sources"]):
        key = "██" if coloured else _letter(i)
        console.print(Text.assemble((key, source_colour(i)), f" {_spelled(source['name'])}"))
    notes = []
    for pack in report["packs"]:
        used = sum(document["tokens"] for document in pack["documents"])
        notes.append(f" {used / report['pack_tokens']:6.1%}, {len(pack['documents']):,} documents")
    width = max(10, console.width - max(map(len, notes)) - 4)
    for i, (pack, note) in enumerate(zip(report["packs"], notes, strict=True), start=1):
        row = Text(f"{i:>3} ", no_wrap=True)
        for cell in cells(pack["documents"], report["pack_tokens"], width):
            row.append_text(_cell(cell, coloured=coloured))
        console.print(row.append(note))


def _cell(cell: tuple[int, bool, bool] | None, *, coloured: bool) -> Text:
    if cell is None:
        return Text("·", "dim") if coloured else Text(".")
    source, trained, starts = cell
    if not coloured:
        return Text("|" if starts else _letter(source).upper() if trained else _letter(source))
    # Half a character is left free where a document starts.
    return Text("▐" if starts else "█" if trained else "░", source_colour(source))


def _letter(source: int) -> str:
    return chr(ord("a") + source % 26)


def _heading(console: Console, title: str, note: str = "") -> None:
    console.print(Text.assemble("\n", (title, "bold"), f"  {note}" if note else ""))


def _table(headings: Sequence[str], rows: Sequence[Sequence[int | str | None]]) -> Table:
    """Text on the left, numbers on the right; long text is folded and never cut."""
    table = Table(box=SIMPLE_HEAD)
    for i, heading in enumerate(headings):
        right = all(isinstance(row[i], int) or str(row[i]).endswith("%") for row in rows)
        table.add_column(heading, justify="right" if right else "left", overflow="fold", no_wrap=i == 0)
    for row in rows:
        said = ["" if value is None else f"{value:,}" if isinstance(value, int) else _spelled(value) for value in row]
        table.add_row(*map(Text, said))
    return table


def _percent(share: float) -> str:
    return "<0.1%" if 0 < share < 0.001 else f"{share:.1%}"


def _schedule(weight: Sequence[Sequence[float]]) -> str:
    """1, or 1 to 0.2 at draw 5,000: as the mixture reads it, linear in between."""
    (_, first), *rest = weight
    return " to ".join([f"{first:g}", *(f"{value:g} at draw {int(draw):,}" for draw, value in rest)])


def _spelled(text: str) -> str:
    return "".join(map(markup.spelled, text))
