"""The text of the cards as HTML, from parts that cannot be broken out of.

Metaflow's Markdown component passes an HTML block through untouched, up to the first
blank line. So every function here returns one line of Html, and whatever is not Html
yet is escaped when it is put in: text of models and users is never markup.
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any


class Html(str):
    """Markup that is safe to show as it is, without line breaks."""


SHOWN = 400
"""Characters of a prompt or completion; of longer ones the beginning and the end are shown."""

STYLE = (
    # Metaflow stacks a page's components; charts go beside each other where the window has room.
    ".mf-card .sectionItems{display:grid;gap:1.25rem 2rem;"
    "grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr))}"
    ".mf-card .sectionItems>*{grid-column:1/-1;min-width:0}"
    ".mf-card .sectionItems>.vega-embed{grid-column:auto}"
    ".mf-card .sectionItems>.pt+.vega-embed{grid-column:1/-1}"
    ".pt h1{font-size:1.7rem;margin:0}.pt h2{font-size:1.15rem;margin:.75rem 0 .5rem}"
    ".pt .note{color:#5b6470;margin:0}"
    ".pt .track{background:#e6ebf2;border-radius:4px;height:8px;margin:.5rem 0 1rem}"
    ".pt .track div{background:#2f6fde;border-radius:4px;height:8px}"
    ".pt .boxes{display:grid;gap:.75rem;grid-template-columns:repeat(auto-fit,minmax(7.5rem,1fr))}"
    ".pt .box{border:1px solid #e3e7ec;border-radius:6px;padding:.7rem .85rem}"
    ".pt .box b{display:block;font-size:1.55rem;line-height:1.3;color:#1f2733}"
    ".pt .box span{color:#5b6470;font-size:.85rem;display:block}"
    ".pt .scroll{overflow-x:auto}.pt table{border-collapse:collapse;width:100%}"
    ".pt th{text-align:left;padding:.35rem .75rem;border-bottom:1px solid #c4c9d0;white-space:nowrap}"
    ".pt td{text-align:left;vertical-align:top;background:none;padding:.35rem .75rem;"
    "border-bottom:1px solid #eceef1;overflow-wrap:anywhere}"
    ".pt .rich{min-width:10rem}.pt .plain{white-space:nowrap}"
    ".pt .number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}"
    ".pt .said{font-family:var(--mono-font);font-size:.85rem;white-space:pre-wrap;unicode-bidi:isolate}"
    ".pt .faint{color:#7d8896}"
    ".pt .tokens{line-height:2.1}.pt .tokens .said{border-radius:3px;padding:.15rem .2rem;margin-right:2px}"
    ".pt .trained{background:#2f6fde;color:#fff;font-weight:700}.pt .trained .faint{color:#cfe0ff}"
    ".pt .masked{background:#f0f2f5;color:#5b6470}"
)


def page(title: str, facts: Sequence[str]) -> Html:
    """The head of a card, and the style of all that follows."""
    return block(
        Html(f"<style>{STYLE}</style><h1>{escaped(title)}</h1>"),
        Html(f'<p class="note">{escaped(" · ".join(facts))}</p>'),
    )


def block(*parts: Html) -> Html:
    """Parts as the text of one Markdown component."""
    whole = f'<div class="pt">{"".join(parts)}</div>'
    assert "\n" not in whole, "a line break would end the HTML block"
    return Html(whole)


def heading(text: str, note: str = "") -> Html:
    """A heading within a card, and a note below it."""
    return Html(f"<h2>{escaped(text)}</h2>" + (f'<p class="note">{escaped(note)}</p>' if note else ""))


def progress(done: int, total: int, note: str) -> Html:
    """A bar with its numbers above it."""
    share = 100 * min(1.0, done / max(1, total))
    return Html(
        f"<div><b>Step {done:,} of {total:,}</b> &nbsp;{escaped(note)}</div>"
        f'<div class="track"><div style="width:{share:.1f}%"></div></div>'
    )


def boxes(found: Iterable[tuple[str, str, str]]) -> Html:
    """Value boxes: title, value, and a note below it."""
    inside = [
        f'<div class="box"><span>{escaped(title)}</span><b>{escaped(value)}</b><span>{escaped(note)}</span></div>'
        for title, value, note in found
    ]
    return Html(f'<div class="boxes">{"".join(inside)}</div>')


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> Html:
    """Text is set left; numbers are formatted and set right, as are the headings of columns full of them."""
    rows = [list(row) for row in rows]
    numeric = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(headings))]
    head = "".join(f"<th{_right(right)}>{escaped(h)}</th>" for h, right in zip(headings, numeric, strict=True))
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return Html(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def said(text: str, *, kind: str = "") -> Html:
    """What a model or a user wrote, letter by letter: line breaks and invisible characters can be seen."""
    if len(text) > SHOWN:
        left_out = len(text) - SHOWN
        start, end = text[: SHOWN * 2 // 3], text[len(text) - SHOWN + SHOWN * 2 // 3 :]
        inside = f'{_visible(start)}<span class="faint"> … {left_out:,} characters … </span>{_visible(end)}'
    else:
        inside = _visible(text) or '<span class="faint">(empty)</span>'
    return Html(f'<span class="said {kind}">{inside}</span>')


def tokens(preview: Sequence[dict[str, Any]], *, limit: int = 500) -> Html:
    """Tokens one by one, those that are trained standing out; of a long text, the part where training starts."""
    first = next((i for i, token in enumerate(preview) if token["trained"]), 0)
    start = 0 if len(preview) <= limit else max(0, min(first - limit // 4, len(preview) - limit))
    shown = preview[start : start + limit]
    inside = []
    for token in shown:
        kind = "trained" if token["trained"] else "masked"
        inside.append(f'<span class="said {kind}">{_visible(token["token"], one_line=True)}</span>')
        inside += ["<br>"] * ("\n" in token["token"])
    hidden = {"before": start, "after": len(preview) - start - len(shown)}
    note = " ".join(f"{count:,} tokens {where} are not shown." for where, count in hidden.items() if count)
    key = '<p class="note tokens"><span class="said trained">trained</span> <span class="said masked">read only</span>'
    return Html(f'{key} &nbsp;{escaped(note)}</p><div class="tokens">{"".join(inside)}</div>')


def number(value: float) -> str:
    """Three or four digits that matter: 12,436, 6.91, 0.783, 2.76e-07."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-3:
        return f"{value:.2e}"
    if size >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 100 else f"{value:.2f}" if size >= 1 else f"{value:.3f}"


def duration(seconds: float) -> str:
    """8.5 s, 48 s, 4 min 05 s, 3 h 20 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def lines(texts: Iterable[str]) -> Html:
    """Texts below each other."""
    return Html("<br>".join(map(escaped, texts)))


def escaped(value: object) -> Html:
    """Anything as text in one line; Html stays as it is."""
    return value if isinstance(value, Html) else Html(html.escape(" ".join(str(value).split())))


def _visible(text: str, *, one_line: bool = False) -> str:
    """Escaped; line breaks can be seen, characters that cannot be printed are spelled out.

    In one line, as a token is shown, spaces can be seen too, and line breaks do not break.
    """
    marks = {"\n": "⏎", " ": "·"} if one_line else {"\n": "⏎"}
    after = "" if one_line else "<br>"
    shown = []
    for char in text:
        if char in marks:
            shown.append(f'<span class="faint">{marks[char]}</span>{after}')
        elif char.isprintable():
            shown.append(html.escape(char))
        else:
            shown.append(f'<span class="faint">{html.escape(ascii(char)[1:-1])}</span>')
    return "".join(shown)


def _cell(value: object) -> str:
    if isinstance(value, int | float):
        return f"<td{_right(True)}>{number(value)}</td>"
    kind = "rich" if isinstance(value, Html) else "plain"
    return f'<td class="{kind}">{escaped(value)}</td>'


def _right(right: bool) -> str:
    return ' class="number"' if right else ""
