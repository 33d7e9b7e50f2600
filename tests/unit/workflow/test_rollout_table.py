"""The table of rollouts: what it holds is bounded, what a model wrote stays text, rows say what they are sorted by."""

from html.parser import HTMLParser

import pytest

from posttrain.data.types import Prompt, Rollout
from posttrain.errors import RewardError
from posttrain.workflow import rollout_table
from posttrain.workflow.rollout_table import DROPPED, EARLIER, LATEST, MOST_BYTES, PAGE_ROWS, RolloutSample
from posttrain.workflow.rollouts import Dropped

HOSTILE = (
    "<script>hacked()</script><img src=x onerror=hacked()>\n\n# h\n"
    '</span></td></tr></table></div>" onclick="hacked()" \'x\' `y` &lt; \u202e \x00 \u2028'
)


class Page(HTMLParser):
    """The tags of a fragment with their attributes, its rows' attributes, and the text of every row's cells."""

    def __init__(self, fragment: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[dict[str, str | None]] = []
        self.cells: list[list[str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(fragment)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("br", "input"):
            self.open.append(tag)
        if tag == "tr" and "tbody" in self.open:
            self.rows.append(dict(attrs))
            self.cells.append([])
        if tag == "td":
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open:
            self.cells[-1][-1] += data


def rollout(uid=0, sample=0, text="12", reward: float | None = 1.0, **changes) -> Rollout:
    prompt = Prompt(uid=uid, token_ids=(1,), row={"messages": [{"role": "user", "content": f"sort {uid}"}]})
    kept = {"token_ids": (1, 2), "logprobs": (0.0, 0.0), "versions": (0, 0), "finish_reason": "stop"}
    return Rollout(**{"prompt": prompt, "sample_index": sample, "text": text, "reward": reward, **kept, **changes})


def groups(count: int, size: int = 4, **changes) -> list[list[Rollout]]:
    return [[rollout(uid, i, reward=i / size, **changes) for i in range(size)] for uid in range(count)]


def page_of(step, groups, dropped=()) -> Page:
    sample = RolloutSample("runs/17/rollouts")
    sample.add(step, groups, dropped)
    return Page(sample.table())


def test_a_row_says_all_of_a_rollout_and_by_which_numbers_it_is_sorted():
    kept = {"versions": (4, 6, 6), "token_ids": (5, 6, 7), "finish_reason": "length"}
    page = page_of(6, [[rollout(3, 1, "13", 0.25, parts={"exact": 0.5, "form": -0.25}, **kept)]])
    assert page.cells == [
        ["7", "3sample 1", "sort 3", "13", "0.250exact 0.500form -0.250", "3", "2weights 4 to 6", "length limit"]
    ]
    sorted_by = {"data-step": "7", "data-draw": "3", "data-reward": "0.25", "data-tokens": "3", "data-age": "2"}
    assert page.rows == [sorted_by]
    offered = {found["data-by"] for tag, found in page.tags if tag == "button" and "data-by" in found}
    assert {f"data-{name}" for name in offered} == set(sorted_by)
    assert "runs/17/rollouts/step_000006.parquet" in page.text


def test_a_group_is_shown_with_its_best_rollout_first():
    page = page_of(0, [[rollout(0, 0, reward=0.5), rollout(0, 1, reward=-1.0), rollout(0, 2, reward=2.0)]])
    assert [row["data-reward"] for row in page.rows] == ["2", "0.5", "-1"]


def test_dropped_groups_say_why_and_those_without_a_reward_have_none_to_sort_by():
    failed = Dropped(reason="reward_error", error=RewardError("the <b>verifier</b> is down\nfor good"))
    silent = Dropped(reason="no_signal", rollouts=(rollout(9, 0, "a", 0.0), rollout(9, 1, "b", 0.0)))
    page = page_of(2, groups(1), [(rollout(8).prompt, failed), (rollout(9).prompt, silent)])
    last = [cells[-1] for cells in page.cells]
    cause = "dropped: reward_errorthe <b>verifier</b> is down for good"
    assert last == ["stop token"] * 4 + [cause, *["stop tokendropped: no_signal"] * 2]
    assert "data-reward" not in page.rows[4] and page.rows[5]["data-reward"] == "0"


def test_what_a_model_a_user_or_a_reward_wrote_stays_text():
    prompt = Prompt(uid=1, token_ids=(1,), row={"prompt": HOSTILE})
    hostile = rollout(1, 0, HOSTILE, parts={HOSTILE: 1.0}, prompt=prompt)
    why = Dropped(reason=HOSTILE, error=RewardError(HOSTILE))
    sample = RolloutSample(HOSTILE)
    sample.add(0, [[hostile]], [(prompt, why)])
    table = sample.table()
    assert len(table.splitlines()) == 1, "a line break would end the HTML block"
    page, harmless = Page(table), Page(page_html())
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in harmless.tags} | {"b", "br"}
    handlers = [(tag, name) for tag, found in page.tags for name in found if name.startswith("on")]
    assert handlers == [("div", "oninput"), ("div", "onclick")], "the table's own, and no other"
    assert "<script>hacked()</script><img src=x onerror=hacked()>" in page.cells[0][3]
    assert "\\u202e \\x00 \\u2028" in page.cells[0][3]


def page_html() -> str:
    sample = RolloutSample("runs")
    sample.add(0, [[rollout(parts={"a": 1.0})]], [])
    return sample.table()


def test_the_program_holds_no_text_of_a_run():
    programs = {found["oninput"] for tag, found in Page(page_html()).tags if "oninput" in found}
    assert programs == {rollout_table.PROGRAM}


@pytest.mark.parametrize("steps", [1, 2, 30, 200])
def test_a_run_of_any_length_has_a_bounded_table_with_its_first_and_its_latest_steps(steps: int):
    sample = RolloutSample("runs")
    lost = [(rollout(7).prompt, Dropped(reason="reward_error", error=RewardError("down")))] * 3 * DROPPED
    for step in range(steps):
        sample.add(step, groups(64), lost)
    page = Page(sample.table())
    shown = [int(row["data-step"] or 0) for row in page.rows]
    assert shown.count(steps) == LATEST
    assert len(shown) <= LATEST + EARLIER and len(shown) - LATEST >= min(6 * (steps - 1), EARLIER // 3)
    assert shown == sorted(shown, reverse=True) and shown[-1] == 1
    gaps = {a - b for a, b in zip(sorted(set(shown))[1:-1], sorted(set(shown))[:-2], strict=True)}
    assert len(gaps) <= 1, "earlier steps are at equal distances"
    options = [found["value"] for tag, found in page.tags if tag == "option"]
    assert options == ["", *(str(step) for step in dict.fromkeys(shown))]


def test_only_the_first_page_is_shown_until_a_control_asks():
    page = page_of(0, groups(64))
    assert ["hidden" in row for row in page.rows] == [False] * PAGE_ROWS + [True] * (LATEST - PAGE_ROWS)
    assert f"1 to {PAGE_ROWS} of {LATEST}" in page.text


def test_long_texts_are_cut_with_a_note_and_texts_that_swell_cost_rows():
    long = page_of(0, [[rollout(text="begin " + "x" * 50_000 + " end")]])
    assert "49,210 characters" in long.cells[0][3] and len(long.cells[0][3]) < 900
    sample = RolloutSample("runs")
    sample.add(0, groups(64, text="\x00" * 5_000), [])
    table = sample.table()
    assert MOST_BYTES * 0.9 < len(table.encode()) < MOST_BYTES + 10_000
    assert 10 < len(Page(table).rows) < LATEST


def test_before_the_first_step_there_is_no_table():
    assert RolloutSample("runs").table() == ""
