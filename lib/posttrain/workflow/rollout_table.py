"""The rollouts of a run as a table on its card, to page through, sort and filter: a bounded sample of them, as HTML.

A card is one file without a network, and its HTML is put in where no <script> runs; so the table carries its rows, and
its controls a small program in their handlers. All rows are in the page, a page of them is shown.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from posttrain.data.types import Prompt, Rollout, Row
from posttrain.workflow import markup
from posttrain.workflow.evaluate import last_user_text
from posttrain.workflow.markup import Html
from posttrain.workflow.rollout_file import file_of
from posttrain.workflow.rollouts import Dropped, DroppedGroup

LATEST, EARLIER, DROPPED = 100, 100, 20
"""Rows of the latest step, of all earlier ones, and of the latest those that were dropped."""
BRIEF_GROUPS = 2
"""Of an earlier step the best and the worst of so many groups are kept, and as many that were dropped."""
PROMPT_CHARS, COMPLETION_CHARS = 240, 800
PAGE_ROWS = 20
MOST_BYTES = 2**20
"""Of all rows; a card is sent again with every refresh. Texts that are nothing but control characters reach it."""

COLUMNS = {"step": "step", "draw": "draw", "prompt": "", "completion": "", "reward": "reward", "tokens": "tokens"}
COLUMNS |= {"age": "age", "ended by": ""}
"""Title -> name of the row's data attribute that the column is sorted by, if it is."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A rollout, or a group that was dropped before it was sampled, as a row of the table."""

    step: int
    kind: str
    """"best" or "worst" of its group, "dropped", or ""."""
    html: Html


@dataclass(slots=True)
class RolloutSample:
    """What the table shows of a run: much of the latest step, and a little of steps at equal distances before it."""

    uri: str
    """Of the folder that has all rollouts (workflow/rollout_file.py)."""
    latest: list[Shown] = field(default_factory=list)
    earlier: dict[int, list[Shown]] = field(default_factory=dict)
    stride: int = 1
    of_latest: int = 0
    """Rollouts that the latest step had, shown or not."""

    def add(self, step: int, groups: Sequence[Sequence[Rollout]], dropped: Sequence[DroppedGroup]) -> None:
        """Take the next step; the one before it becomes an earlier one."""
        if self.latest:
            self._keep_brief(self.latest[0].step)
        lost = list(chain.from_iterable(_dropped_rows(step, prompt, why) for prompt, why in dropped[:DROPPED]))
        lost = lost[:DROPPED]
        found: list[Shown] = []
        for group in groups:
            if len(found) + len(lost) >= LATEST:
                break
            found += _group_rows(step, group)
        self.latest = [*found[: LATEST - len(lost)], *lost]
        self.of_latest = sum(map(len, groups)) + sum(len(why.rollouts) for _, why in dropped)

    def table(self) -> Html:
        """One block of markup; empty before the first step."""
        if not self.latest:
            return Html("")
        rows = [*self.latest, *chain.from_iterable(reversed(self.earlier.values()))]
        shown, size = [], 0
        for row in rows:
            size += len(row.html.encode())
            if size > MOST_BYTES:
                break
            shown.append(row)
        return markup.block(
            Html(f"<style>{STYLE}</style>"),
            markup.heading("Rollouts", self._note(shown)),
            _browser(shown),
        )

    def _keep_brief(self, step: int) -> None:
        if step % self.stride == 0:
            chosen = [row for row in self.latest if row.kind in ("best", "worst")][: 2 * BRIEF_GROUPS]
            self.earlier[step] = chosen + [row for row in self.latest if row.kind == "dropped"][:BRIEF_GROUPS]
        while sum(map(len, self.earlier.values())) > EARLIER:
            self.stride *= 2
            self.earlier = {step: rows for step, rows in self.earlier.items() if step % self.stride == 0}

    def _note(self, shown: Sequence[Shown]) -> str:
        step = self.latest[0].step
        now = sum(row.step == step for row in shown)
        others = len({row.step for row in shown} - {step})
        parts = [f"{now:,} rows of step {step + 1:,}, which had {self.of_latest:,} rollouts"]
        if others:
            parts.append(f"the best and the worst of the first groups of {others:,} earlier step{'s' * (others > 1)}")
        return f"{'; '.join(parts)}. Long texts are cut; all are whole in {file_of(self.uri, step)}"


def _group_rows(step: int, group: Sequence[Rollout]) -> list[Shown]:
    """A scored group, its best rollout first."""
    ranked = sorted(group, key=lambda rollout: -(rollout.reward or 0.0))
    kinds = {0: "best", len(ranked) - 1: "worst"} if len(ranked) > 1 else {0: "best"}
    return [_row(step, rollout, kinds.get(place, "")) for place, rollout in enumerate(ranked)]


def _dropped_rows(step: int, prompt: Prompt, why: Dropped) -> list[Shown]:
    if why.rollouts:
        return [_row(step, rollout, "dropped", why) for rollout in why.rollouts]
    cells = [step + 1, prompt.uid, _asked(prompt.row), "", "", "", "", _lost(why)]
    return [Shown(step, "dropped", _tr({"step": step + 1, "draw": prompt.uid}, cells))]


def _row(step: int, rollout: Rollout, kind: str, why: Dropped | None = None) -> Shown:
    parts = [f"{name} {markup.number(value)}" for name, value in rollout.parts.items() if name != "reward"]
    reward = "" if rollout.reward is None else markup.number(rollout.reward)
    oldest, newest = min(rollout.versions, default=step), max(rollout.versions, default=step)
    of = f"weights {oldest:,}" if oldest == newest else f"weights {oldest:,} to {newest:,}"
    tokens = len(rollout.token_ids)
    keys = {"step": step + 1, "draw": rollout.prompt.uid, "tokens": tokens, "age": step - oldest}
    scored = {} if rollout.reward is None else {"reward": rollout.reward}
    ended = "length limit" if rollout.finish_reason == "length" else "stop token"
    cells = [
        step + 1,
        Html(f"{rollout.prompt.uid:,}{_small([f'sample {rollout.sample_index}'])}"),
        _asked(rollout.prompt.row),
        markup.said(rollout.text, limit=COMPLETION_CHARS),
        Html(f"{reward}{_small(parts)}"),
        tokens,
        Html(f"{step - oldest:,}{_small([of])}"),
        Html(f"{ended}{'' if why is None else f'<br>{_lost(why)}'}"),
    ]
    return Shown(step, kind, _tr(keys | scored, cells))


def _asked(row: Row) -> Html:
    return markup.said(last_user_text(row), limit=PROMPT_CHARS)


def _lost(why: Dropped) -> Html:
    cause = "" if why.error is None else str(why.error)[:PROMPT_CHARS]
    return Html(f"<b>dropped: {markup.escaped(why.reason)}</b>{_small([cause] if cause else [])}")


def _small(texts: Sequence[str]) -> Html:
    return Html("".join(f'<span class="part">{markup.escaped(text)}</span>' for text in texts))


def _tr(keys: Mapping[str, float], cells: Sequence[object]) -> Html:
    data = "".join(f' data-{name}="{value:.9g}"' for name, value in keys.items())
    inside = "".join(f"<td>{markup.number(c) if isinstance(c, int) else markup.escaped(c)}</td>" for c in cells)
    return Html(f"<tr{data}>{inside}</tr>")


def _browser(rows: Sequence[Shown]) -> Html:
    """The controls and all rows; those after the first page are hidden until a control asks for them."""
    heads = "".join(
        f'<th><button type="button" data-by="{by}" title="sort by {title}">{title}</button></th>'
        if by
        else f"<th>{title}</th>"
        for title, by in COLUMNS.items()
    )
    pages = [row.html if i < PAGE_ROWS else row.html.replace("<tr", "<tr hidden", 1) for i, row in enumerate(rows)]
    steps = "".join(f'<option value="{step + 1}">step {step + 1:,}</option>' for step in _steps(rows))
    end = min(PAGE_ROWS, len(rows))
    more = "" if len(rows) > PAGE_ROWS else " disabled"
    return Html(
        f'<div class="browse" data-page="0" oninput="{html.escape(PROGRAM)}" onclick="this.oninput(event)">'
        f'<div class="bar"><input type="search" placeholder="filter by text" aria-label="filter by text">'
        f'<select aria-label="step"><option value="">all steps</option>{steps}</select>'
        f'<button type="button" data-turn="-1" disabled>previous</button>'
        f'<span role="status">1 to {end} of {len(rows)}</span>'
        f'<button type="button" data-turn="1"{more}>next</button></div>'
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(pages)}</tbody></table></div></div>'
    )


def _steps(rows: Sequence[Shown]) -> list[int]:
    return list(dict.fromkeys(row.step for row in rows))


PROGRAM = (
    "const button=event.target.closest('button'),state=this.dataset,rows=[...this.querySelectorAll('tbody tr')];"
    "if(event.type==='click'&&!button)return;"
    "const by=button&&button.dataset.by,turn=button&&button.dataset.turn;"
    "if(by){"
    # The largest first; the other way round at the next click. Rows without the value come last.
    "state.down=state.by===by&&state.down==='1'?'0':'1';state.by=by;"
    "const sign=state.down==='1'?-1:1,value=row=>by in row.dataset?sign*row.dataset[by]:1e300;"
    "rows.sort((a,b)=>value(a)-value(b)).forEach(row=>row.parentNode.append(row));"
    "this.querySelectorAll('th').forEach(th=>th.removeAttribute('aria-sort'));"
    "button.parentNode.setAttribute('aria-sort',state.down==='1'?'descending':'ascending');}"
    "state.page=turn?+state.page+ +turn:0;"
    "const words=this.querySelector('input').value.toLowerCase(),step=this.querySelector('select').value,"
    "found=rows.filter(row=>(!step||row.dataset.step===step)&&row.textContent.toLowerCase().includes(words)),"
    f"start=state.page*{PAGE_ROWS},end=Math.min(start+{PAGE_ROWS},found.length);"
    "rows.forEach(row=>row.hidden=true);found.slice(start,end).forEach(row=>row.hidden=false);"
    "this.querySelector('[role=status]').textContent=found.length?`${start+1} to ${end} of ${found.length}`:'none';"
    "this.querySelector('[data-turn=\"-1\"]').disabled=!start;"
    "this.querySelector('[data-turn=\"1\"]').disabled=end>=found.length;"
)
"""What a click on a button and every change of the filter and the step do; `this` is the whole browser."""

STYLE = (
    ".pt .bar{display:flex;flex-wrap:wrap;gap:.5rem;align-items:center;margin:.6rem 0}"
    ".pt .browse :is(input,select,button){font:inherit;color:inherit;background:transparent;cursor:pointer;"
    "border:1px solid #a3abb6;border-radius:4px;padding:.2rem .6rem}"
    ".pt .browse select option{color:#1f2733;background:#fff}"
    ".pt .browse input{flex:1 1 12rem;min-width:0;cursor:text}.pt .browse button:disabled{opacity:.4;cursor:default}"
    ".pt .browse th button{border:none;padding:0;font-weight:700;text-decoration:underline dotted}"
    ".pt .browse th[aria-sort=descending] button::after{content:' ↓'}"
    ".pt .browse th[aria-sort=ascending] button::after{content:' ↑'}"
    ".pt .browse tr[hidden]{display:none}.pt .browse td{font-variant-numeric:tabular-nums}"
    ".pt .browse :is(th,td){padding:.35rem .5rem}"
    ".pt .browse td:nth-child(3){width:22%;min-width:9rem}.pt .browse td:nth-child(4){width:48%;min-width:14rem}"
    ".pt .browse .said{display:block;max-height:11rem;overflow-y:auto}.pt .browse .said .faint{display:inline}"
    ".pt .part{display:block;font-size:.85rem;color:#7d8896;white-space:nowrap}"
    ".pt .browse td:last-child .part{white-space:normal;min-width:8rem}"
    # A narrow window: numbers beside each other with their names before them, then the prompt and the completion.
    "@media(max-width:44rem){.pt .browse :is(table,thead,tbody){display:block}"
    ".pt .browse th{display:inline-block;border:none;padding:.2rem .75rem .2rem 0}"
    ".pt .browse th:not(:has(button)){display:none}"
    ".pt .browse tbody tr:not([hidden]){display:flex;flex-wrap:wrap;gap:.1rem 1rem;padding:.6rem 0;"
    "border-bottom:1px solid #c4c9d0}"
    ".pt .browse td:nth-child(n){border:none;padding:0;min-width:0;width:auto}"
    ".pt .browse :is(td:nth-child(3),td:nth-child(4)){order:1;flex:1 0 100%}"
    ".pt .browse .part{display:inline;margin-left:.5rem;white-space:normal}"
)
STYLE += "".join(
    f".pt .browse td:nth-child({place})::before{{content:'{title} ';color:#7d8896}}"
    for place, title in enumerate(COLUMNS, start=1)
    if title not in ("prompt", "completion")
)
STYLE += "}"
