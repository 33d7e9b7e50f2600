"""The text of the cards as HTML, from parts that cannot be broken out of.

Metaflow's Markdown component passes an HTML block through untouched, up to the first
blank line. So every function here returns one line of Html, and whatever is not Html
yet is escaped when it is put in: text of models and users is never markup.
"""

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any


class Html(str):
    """Markup that is safe to show as it is, without line breaks."""


SHOWN = 400
"""Characters of a text, where a page does not say otherwise."""
THIN = 1 / 400
"""Share of a pack, some two pixels; thinner documents beside each other are drawn as one."""
NUMBER = re.compile(r"(⚠ )?[+-]?[\d.,]+( ?%| [kMGT]?B)?")
"""Text that is set as a number: a share, a size."""
Segment = tuple[int, int, int]
"""Source, tokens, and how many of them are trained."""

STYLE = (
    # Metaflow stacks a page's components; charts go beside each other where the window has room.
    ".mf-card .sectionItems{display:grid;gap:1.25rem 2rem;"
    "grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr))}"
    ".mf-card .sectionItems>*{grid-column:1/-1;min-width:0}"
    ".mf-card .sectionItems>.vega-embed{grid-column:auto}"
    ".mf-card .sectionItems>.pt+.vega-embed{grid-column:1/-1}"
    ".mf-card.embed main{min-width:min(100%,100rem)}"
    ".pt h1{font-size:1.7rem;margin:0}.pt h2{font-size:1.15rem;margin:.75rem 0 .5rem}"
    ".pt .note{color:#5b6470;margin:0}"
    ".pt .track{background:#e6ebf2;border-radius:4px;height:8px;margin:.5rem 0 1rem}"
    ".pt .track div{background:#2f6fde;border-radius:4px;height:8px}"
    ".pt .boxes{display:grid;gap:.75rem;grid-template-columns:repeat(auto-fit,minmax(7.5rem,1fr))}"
    ".pt .box{border:1px solid #e3e7ec;border-radius:6px;padding:.7rem .85rem}"
    ".pt .box b{display:block;font-size:1.55rem;line-height:1.3;color:#1f2733}"
    ".pt .box span{color:#5b6470;font-size:.85rem;display:block}"
    ".pt .banner{border-left:4px solid #c9414b;background:#fbeced;border-radius:4px;padding:.7rem .95rem}"
    ".pt .banner span{display:block;overflow-wrap:anywhere}"
    ".pt .scroll{overflow-x:auto}.pt .scroll+.scroll{margin-top:1rem}.pt table{border-collapse:collapse;width:100%}"
    ".pt th{text-align:left;padding:.35rem .75rem;border-bottom:1px solid #c4c9d0;white-space:nowrap}"
    ".pt td{text-align:left;vertical-align:top;background:none;padding:.35rem .75rem;"
    "border-bottom:1px solid #eceef1;overflow-wrap:anywhere}"
    ".pt .rich{min-width:10rem}.pt .plain{white-space:nowrap}"
    ".pt .number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}"
    ".pt .said{font-family:var(--mono-font);font-size:.85rem;white-space:pre-wrap;overflow-wrap:anywhere;"
    "unicode-bidi:isolate}"
    ".pt .faint{color:#7d8896}"
    ".pt .tokens+.tokens{margin-top:.5rem}.pt .note+:is(.boxes,.scroll){margin-top:.6rem}"
    ".pt .tokens{line-height:2.1}.pt .tokens .said{border-radius:3px;padding:.15rem .2rem;margin-right:2px}"
    ".pt .trained{background:#2f6fde;color:#fff;font-weight:700}.pt .trained .faint{color:#cfe0ff}"
    ".pt .masked{background:#f0f2f5;color:#5b6470}"
    ".pt .packs{display:grid;grid-template-columns:max-content 1fr max-content;gap:.3rem .75rem;align-items:center;"
    "margin-top:.6rem}"
    ".pt .packs svg{display:block;width:100%;height:1.1rem;stroke-width:1;shape-rendering:crispEdges}"
    ".pt .packs svg,.pt .empty{background:repeating-linear-gradient(135deg,#fff 0 3px,#dfe3e8 3px 4px)}"
    ".pt .packs .gap{stroke:#fff;vector-effect:non-scaling-stroke}.pt .untrained{opacity:.35}"
    ".pt .packs .note{font-variant-numeric:tabular-nums}"
    ".pt .key{display:inline-block;width:.85rem;height:.85rem;border-radius:2px;margin:0 .35rem 0 1rem}"
    "@media(max-width:30rem){.pt td,.pt th{padding:.3rem .35rem;font-size:.85rem}.pt .rich{min-width:7rem}}"
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


def banner(title: str, text: str) -> Html:
    """What nobody may overlook."""
    return Html(f'<div class="banner"><b>{escaped(title)}</b><span>{escaped(text)}</span></div>')


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
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(headings))]
    head = "".join(f"<th{_right(right)}>{escaped(h)}</th>" for h, right in zip(headings, numeric, strict=True))
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return Html(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def said(text: str, *, kind: str = "", limit: int = SHOWN) -> Html:
    """What a model or a user wrote, letter by letter: line breaks and invisible characters can be seen.

    Args:
        limit: characters that are shown, from the beginning and the end of longer texts.
    """
    if len(text) > limit:
        left_out = len(text) - limit
        start, end = text[: limit * 2 // 3], text[len(text) - limit + limit * 2 // 3 :]
        inside = f'{_visible(start)}<span class="faint"> … {left_out:,} characters … </span>{_visible(end)}'
    else:
        inside = _visible(text) or '<span class="faint">(empty)</span>'
    return Html(f'<span class="said {kind}">{inside}</span>')


def tokens(preview: Sequence[dict[str, Any]], *, limit: int = 500) -> Html:
    """Tokens one by one, those that are trained standing out; of a long text, the part where training starts."""
    shown, note = around_training(preview, limit)
    inside = []
    for token in shown:
        kind = "trained" if token["trained"] else "masked"
        inside.append(f'<span class="said {kind}">{_visible(token["token"], one_line=True)}</span>')
        inside += ["<br>"] * ("\n" in token["token"])
    key = '<p class="note tokens"><span class="said trained">trained</span> <span class="said masked">read only</span>'
    return Html(f'{key} &nbsp;{escaped(note)}</p><div class="tokens">{"".join(inside)}</div>')


def around_training(preview: Sequence[dict[str, Any]], limit: int) -> tuple[Sequence[dict[str, Any]], str]:
    """At most `limit` tokens around the first trained one, and a note on those that are left out."""
    first = next((i for i, token in enumerate(preview) if token["trained"]), 0)
    start = 0 if len(preview) <= limit else max(0, min(first - limit // 4, len(preview) - limit))
    shown = preview[start : start + limit]
    hidden = {"before": start, "after": len(preview) - start - len(shown)}
    return shown, " ".join(f"{count:,} tokens {where} are not shown." for where, count in hidden.items() if count)


def legend(names: Iterable[tuple[str, str]], *notes: Html) -> Html:
    """What colours stand for: name and colour of each, and notes after them."""
    keys = [f'<span class="key" style="background:{colour}"></span>{escaped(name)}' for name, colour in names]
    return Html(f'<p class="note">{"".join([*keys, *notes])}</p>')


def packs(found: Sequence[dict[str, Any]], pack_tokens: int, colours: Sequence[str]) -> Html:
    """Packs as strips, width for tokens: a colour for each source, paler where not trained, hatched where empty.

    Raises:
        ValueError: a pack holds more than `pack_tokens`.
    """
    rows = []
    for i, pack in enumerate(found, start=1):
        documents = [(document["source"], document["tokens"], document["trained"]) for document in pack["documents"]]
        used, trained = sum(tokens for _, tokens, _ in documents), sum(trained for *_, trained in documents)
        if used > pack_tokens:
            raise ValueError(f"pack {i} holds {used:,} tokens, over its {pack_tokens:,}")
        says = f"{len(documents):,} documents, {used:,} of {pack_tokens:,} tokens, {trained:,} trained"
        rows.append(
            f'<span class="note">Pack {i}</span>'
            f'<svg viewBox="0 -.5 {pack_tokens} 1" preserveAspectRatio="none" role="img"><title>{says}</title>'
            f"{_strip(segments(documents, pack_tokens * THIN), pack_tokens * THIN, colours)}</svg>"
            f'<span class="note">{len(documents):,} documents, {used / pack_tokens:.1%} full</span>'
        )
    return Html(f'<div class="packs">{"".join(rows)}</div>')


def segments(documents: Iterable[Segment], thin: float) -> list[Segment]:
    """Documents in their order; of a run of documents below `thin` tokens, one segment for each source."""
    found: list[Segment] = []
    run: dict[int, Segment] = {}
    for source, tokens, trained in documents:
        if tokens < thin:
            _, before, of_them = run.get(source, (source, 0, 0))
            run[source] = (source, before + tokens, of_them + trained)
        else:
            found += [*run.values(), (source, tokens, trained)]
            run = {}
    return [*found, *run.values()]


def number(value: float) -> str:
    """Counts in full; of others three or four digits that matter: 12,436, 6.91, 0.783, 2.76e-07."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-3:
        return f"{value:.2e}"
    if size >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 100 else f"{value:.2f}" if size >= 1 else f"{value:.3f}"


def size(count: int) -> str:
    """Bytes as 812 B, 45.2 kB, 1.20 MB, 16.4 GB: powers of a thousand."""
    if count < 1000:
        return f"{count} B"
    power = min(4, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.3g} {'kMGT'[power - 1]}B"


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
    if isinstance(value, Html):
        return value
    return Html(html.escape("".join(map(spelled, " ".join(str(value).split())))))


def spelled(char: str) -> str:
    """A character as it is, or its escape where it cannot be printed: control characters, marks of direction."""
    return char if char.isprintable() else ascii(char)[1:-1]


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
            shown.append(f'<span class="faint">{html.escape(spelled(char))}</span>')
    return "".join(shown)


def _strip(found: Sequence[Segment], thin: float, colours: Sequence[str]) -> str:
    """One path for each colour and shade: thousands of short documents must not make the page heavy."""
    paths: dict[tuple[str, str], str] = {}
    gaps, at, before = "", 0, 0
    for source, tokens, trained in found:
        if min(tokens, before) >= 2 * thin:
            gaps += f"M{at}-.5v1"
        for kind, width in (("untrained", tokens - trained), ("", trained)):
            if width:
                key = (colours[source], kind)
                paths[key] = paths.get(key, "") + f"M{at} 0h{width}"
                at += width
        before = tokens
    drawn = [f'<path class="{kind}" stroke="{colour}" d="{d}"/>' for (colour, kind), d in paths.items()]
    ground = f'<path stroke="#fff" d="M0 0h{at}"/>'  # the hatching of the empty part must not shine through
    return ground + "".join(drawn) + (f'<path class="gap" d="{gaps}"/>' if gaps else "")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and NUMBER.fullmatch(value) is not None)


def _cell(value: object) -> str:
    if _is_number(value):
        return f"<td{_right(True)}>{number(value) if isinstance(value, int | float) else escaped(value)}</td>"
    kind = "rich" if isinstance(value, Html) else "plain"
    return f'<td class="{kind}">{escaped(value)}</td>'


def _right(right: bool) -> str:
    return ' class="number"' if right else ""
