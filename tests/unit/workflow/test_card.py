"""What a card shows, without Metaflow running: chart specs, numbers, and text that must stay text."""

import html
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.workflow import charts, markup
from posttrain.workflow.card import GRPO, SFT, View, all_charts, status
from posttrain.workflow.pages import answers, export_page, promotion_page, verdict

HOSTILE = "a | b `c` \r\n\n# head <b>x</b> <script>y</script> \"q\" 'p' &amp; \u202e \x00 [l](http://e) </div>"


def grpo_rows(count: int) -> list[dict[str, float]]:
    names = {line.metric for chart in GRPO.charts for line in chart.lines}
    rows = [{"step": float(i), **{name: 0.5 + i / 1e6 for name in names}, "time/step_s": 2.0} for i in range(count)]
    for row in rows:
        row |= {"time/generate_s": 0.5, "time/backward_s": 1.0}
        if int(row["step"]) % 10 != 9:
            del row["eval/reward"]
    return rows


def axis_titles(spec: dict) -> set[str]:
    return {name for name in ("x", "y") if spec["encoding"][name].get("title")}


class Opened(HTMLParser):
    """The tags and the text of a fragment."""

    def __init__(self, fragment: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(fragment)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("view", [GRPO, SFT], ids=["grpo", "sft"])
def test_every_chart_is_plain_json_with_a_title_and_axis_titles(view: View):
    row = {line.metric: 0.25 for chart in view.charts for line in chart.lines}
    rows = [{"step": float(step), "time/step_s": 1.0, **row} for step in range(30)]
    specs = [charts.line_chart(chart, rows) for chart in view.charts] + [charts.time_chart(rows, view.phases)]
    for spec in specs:
        assert spec is not None
        assert json.loads(json.dumps(spec, allow_nan=False)) == spec
        assert spec["title"]["text"]
        assert axis_titles(spec) == {"x", "y"}


def test_bar_chart_is_plain_json_and_starts_at_zero():
    spec = charts.bar_chart("Reward", "mean reward", {"before": {"greedy": -3.0}, "after": {"greedy": 12.5}})
    assert json.loads(json.dumps(spec, allow_nan=False)) == spec
    assert axis_titles(spec) == {"x", "y"}
    assert spec["encoding"]["x"]["scale"]["zero"]


@pytest.mark.parametrize("count", [1, 399, 400, 401, 12_345])
def test_thinning_keeps_the_last_row_and_bounds_the_points(count):
    found = charts.thinned([(step, 0.0) for step in range(count)])
    assert found[0][0] == 0
    assert found[-1][0] == count - 1
    assert len(found) <= charts.MAX_POINTS + 1


def test_a_long_run_makes_small_charts_of_every_line():
    rows = grpo_rows(20_000)
    for chart in GRPO.charts:
        spec = charts.line_chart(chart, rows)
        assert spec is not None
        for layer in spec["layer"]:
            assert len(layer["data"]["values"]) <= charts.MAX_POINTS + 1
            assert layer["data"]["values"][-1]["step"] == 20_000
    times = charts.time_chart(rows, GRPO.phases)
    assert times is not None
    assert len(times["data"]["values"]) <= charts.MAX_BARS * (len(GRPO.phases) + 1)


def test_time_bars_add_up_to_the_whole_run():
    rows = grpo_rows(1_003)
    spec = charts.time_chart(rows, GRPO.phases)
    assert spec is not None
    total = sum(bar["seconds"] * (bar["to"] - bar["from"]) for bar in spec["data"]["values"])
    assert total == pytest.approx(2.0 * 1_003)


def test_metrics_that_are_missing_or_not_finite_leave_gaps():
    reward = GRPO.charts[0]
    rows = [{"step": 0.0}, {"step": 1.0, "reward/mean": float("nan")}, {"step": 2.0, "reward/mean": 0.5}]
    spec = charts.line_chart(reward, rows)
    assert spec is not None
    assert [layer["data"]["values"] for layer in spec["layer"]] == [[{"step": 3, "value": 0.5}]]
    assert charts.line_chart(reward, rows[:2]) is None
    assert charts.time_chart(rows, GRPO.phases) is None
    assert "nan" not in status(rows, GRPO.boxes, 3)


def test_trailing_mean_is_of_the_steps_up_to_the_point():
    rows = [{"step": float(i), "m": float(i)} for i in range(6)]
    found = charts.points(charts.Line("m", "mean", mean_of=3), rows)
    assert found == [(1, 0.0), (2, 0.5), (3, 1.0), (4, 2.0), (5, 3.0), (6, 4.0)]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([0.1, 0.8], {"domain": [0, 1]}),
        ([0.0, 0.01], {"zero": True, "nice": True}),
        ([-4.0, 0.8], {"zero": False, "nice": True}),
        ([90.0, 95.0], {"zero": False, "nice": True}),
    ],
)
def test_reward_axis_is_the_unit_interval_only_when_rewards_lie_there(values, scale):
    assert charts.value_scale(values, "share") == scale


def test_parts_of_the_reward_get_a_chart():
    row = {"step": 0.0, "reward/mean": 1.0, "reward/group_std": 0.1, "reward/format": 0.5}
    assert [line.label for line in all_charts(GRPO, [row])[-1].lines] == ["format"]
    assert all_charts(SFT, [{"step": 0.0, "loss": 1.0}]) == list(SFT.charts)


@pytest.mark.parametrize("one_line", [False, True])
def test_hostile_text_stays_text(one_line):
    preview = [{"token": HOSTILE, "trained": True}]
    fragment = markup.tokens(preview) if one_line else markup.said(HOSTILE)
    seen = Opened(fragment)
    assert "\n" not in fragment and "\r" not in fragment
    assert set(seen.tags) <= {"span", "br", "p", "div"}
    for part in ("<b>x</b>", "<script>y</script>", "# head", "`c`", "|", "&amp;", "\\u202e", "\\x00", "\\r", "⏎"):
        assert (part.replace(" ", "·") if one_line else part) in seen.text


def test_titles_facts_names_and_cells_are_escaped():
    fragment = markup.block(
        markup.page("<i>t</i>", ["<i>f</i>\n\n# g"]),
        markup.boxes([("<i>", "<i>", "<i>")]),
        markup.heading("<i>", "<i>"),
        markup.progress(1, 2, "<i>"),
        markup.table(["<i>"], [["<i>"]]),
        markup.lines(["<i>"]),
    )
    assert "i" not in Opened(fragment).tags
    assert "\n" not in fragment


def test_long_text_shows_its_beginning_and_its_end():
    text = "begin " + "x" * 5_000 + " end"
    seen = Opened(markup.said(text)).text
    assert seen.startswith("begin ") and seen.endswith(" end")
    assert "4,610 characters" in seen
    assert len(seen) < 500


def test_long_preview_shows_where_training_starts():
    preview = [{"token": "r", "trained": False}] * 2_000 + [{"token": "T", "trained": True}] * 3_000
    fragment = markup.tokens(preview, limit=100)
    assert 'masked">r' in fragment and 'trained">T' in fragment
    assert "1,975 tokens before" in fragment and "2,925 tokens after" in fragment


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (-1.0, "-1"),
        (12_436_000_000, "12,436,000,000"),
        (0.7834, "0.783"),
        (6.912, "6.91"),
        (123.45, "123.5"),
        (12436.3, "12,436"),
        (2.764e-7, "2.76e-07"),
        (5e12, "5.00e+12"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_show_the_digits_that_matter(value, shown):
    assert markup.number(value) == shown


@pytest.mark.parametrize(
    ("cells", "right"),
    [
        ((1, 2.5), True),
        (("36.8%", "100.0%"), True),
        (("469 B", "4.08 MB"), True),
        (("⚠ 3.1%", "0.0%"), True),
        (("1", "no limit"), False),
        (("83050c626d9e", "2"), False),
        (("", ""), False),
    ],
)
def test_a_column_of_numbers_and_shares_is_set_right(cells, right):
    head = markup.table(["column"], [[cell] for cell in cells]).partition("</thead>")[0]
    assert ('class="number"' in head) is right


@pytest.mark.parametrize(
    ("seconds", "shown"), [(8.51, "8.5 s"), (59.4, "59 s"), (245, "4 min 05 s"), (12_000, "3 h 20 min")]
)
def test_durations_are_for_people(seconds, shown):
    assert markup.duration(seconds) == shown


DOCUMENTS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 60)).flatmap(
        lambda d: st.tuples(st.just(d[0]), st.just(d[1]), st.integers(0, d[1]))
    ),
    max_size=40,
)


@given(DOCUMENTS)
def test_documents_too_thin_to_see_are_drawn_together_and_no_token_is_lost(documents):
    def total(found: list, column: int) -> dict[int, int]:
        return {source: sum(each[column] for each in found if each[0] == source) for source in range(3)}

    found = markup.segments(documents, 20)
    assert [total(found, 1), total(found, 2)] == [total(documents, 1), total(documents, 2)]
    wide = [each for each in documents if each[1] >= 20]
    left = iter(found)
    assert all(each in left for each in wide), "documents that can be seen stay as they are, in their order"
    assert len(found) <= len(documents) and len(found) <= len(wide) + 3 * (len(wide) + 1)


def test_only_a_run_of_thin_documents_is_merged():
    documents = [(0, 5, 1), (1, 2, 2), (0, 4, 0), (1, 50, 9), (1, 3, 3), (1, 20, 0), (0, 1, 1)]
    assert markup.segments(documents, 20) == [(0, 9, 1), (1, 2, 2), (1, 50, 9), (1, 3, 3), (1, 20, 0), (0, 1, 1)]


@given(DOCUMENTS)
def test_a_pack_is_drawn_to_scale(documents):
    used = sum(tokens for _, tokens, _ in documents)
    pack = {"documents": [{"source": s, "tokens": n, "trained": trained} for s, n, trained in documents]}
    fragment = markup.packs([pack], 2_400, ["red", "green", "blue"])
    drawn = re.findall(r'<path class="(untrained|)" stroke="(\w+)" d="([^"]*)"', fragment)
    spans = {(c, kind): [tuple(map(int, s)) for s in re.findall(r"M(\d+) 0h(\d+)", d)] for kind, c, d in drawn}
    for source, colour in enumerate(["red", "green", "blue"]):
        mine = [each for each in documents if each[0] == source]
        assert sum(n for _, n in spans.get((colour, ""), [])) == sum(trained for *_, trained in mine)
        assert sum(n for _, n in spans.get((colour, "untrained"), [])) == sum(n - t for _, n, t in mine)
    edges = sorted((at, at + n) for span in spans.values() for at, n in span)
    assert [start for start, _ in edges] == [0, *(end for _, end in edges[:-1])][: len(edges)], "side by side"
    assert 'viewBox="0 -.5 2400 1"' in fragment
    assert f"{len(documents)} documents, {used:,} of 2,400 tokens" in Opened(fragment).text


def test_a_pack_with_more_tokens_than_it_may_hold_is_not_drawn():
    with pytest.raises(ValueError, match="pack 1 holds 17 tokens, over its 16"):
        markup.packs([{"documents": [{"source": 0, "tokens": 17, "trained": 1}]}], 16, ["red"])


def test_status_shows_the_latest_and_the_first_value_and_no_empty_boxes():
    rows = grpo_rows(12)
    rows[-1]["reward/mean"] = 0.75
    seen = Opened(status(rows, GRPO.boxes, 40)).text
    assert "Step 12 of 40" in seen and "56 s left" in seen
    assert "Training reward0.7500.500 at step 1" in seen
    assert "Held-out reward" in seen
    assert "Held-out reward" not in Opened(status(rows[:5], GRPO.boxes, 40)).text
    assert "finished" in Opened(status(rows, GRPO.boxes, 12)).text


def test_answers_of_all_models_stand_beside_each_other():
    def found(completion: str, reward: float) -> dict:
        numbers = {"greedy_reward": reward, "sampled_reward": reward, "best_reward": 1.0, "mean_tokens": 3.5}
        examples = [{"prompt": "<p>", "completion": completion, "reward": reward}]
        return {"rows": 1, "samples": 4, "examples": examples, **numbers}

    evaluation = {"before": found("<b>no</b>", 0.25), "after": found("yes", 0.75)}
    seen = Opened(answers(evaluation))
    assert "b" not in seen.tags
    assert html.unescape("&lt;p&gt;<b>no</b>0.250yes0.750") in seen.text
    assert "before 0.250, change +0.500" in Opened(verdict(evaluation)).text
    assert "change" not in Opened(verdict({"after": found("yes", 0.75)})).text


@pytest.mark.parametrize(
    ("outcome", "parent", "title"),
    [
        ("promoted", 1, "Promoted as version 2"),
        ("kept", 1, "Version 1 stays champion"),
        ("kept", None, "Not promoted"),
        ("stale", 1, "Too late to be promoted"),
    ],
)
def test_a_promotion_shows_its_decision_both_models_and_the_interval(outcome: str, parent: int | None, title: str):
    comparison = {"rows": 256, "gain": 0.25, "low": 0.125, "high": 0.5, "margin": 0.1, "confidence": 0.9}
    promotion = {"outcome": outcome, "version": 2 if outcome == "promoted" else None, "parent": parent, "files": 3}
    promotion |= {"run": "Flow/7", "why": HOSTILE, "measure": "loss", "comparison": comparison}
    models = {"before": {"loss": 2.5, "scores": {"0": -2.5}}, "after": {"loss": 2.25, "scores": {"0": -2.25}}}
    head, decision, chart, both = promotion_page(promotion, models)
    assert title in Opened(str(head)).text and "script" not in Opened(str(decision)).tags
    assert "+0.25" in Opened(str(decision)).text and "90% sure" in Opened(str(decision)).text
    assert "2.50" in Opened(str(both)).text and "2.25" in Opened(str(both)).text
    assert isinstance(chart, dict)
    values = [layer["data"]["values"][0] for layer in chart["layer"]]
    assert values == [{"low": 0.125, "high": 0.5}, {"gain": 0.25}, {"margin": 0.1}, {"margin": 0.1}]
    assert chart["layer"][-1]["encoding"]["text"] == {"value": "margin 0.1"}
    assert chart["layer"][0]["encoding"]["x"]["title"] == "gain of loss, nats per token or pair"
    json.dumps(chart)


def test_an_export_shows_where_it_is_its_proof_its_runs_and_its_files():
    run = {"run": "SFTFlow/1", "method": "sft", "started_from": "model fresh", "data_fingerprint": "ab" * 32}
    files = {"model.safetensors": {"bytes": 1_234_567, "sha256": "c" * 64}, "a<b>": {"bytes": 7, "sha256": "d" * 64}}
    made = {"uri": "s3://b/runs/<i>", "max_abs_diff": 2e-6, "top1_agreement": 1.0}
    parts = export_page(made, {"files": files, "lineage": [run, run | {"run": "DPOFlow/2", "method": "dpo"}]})
    opened = Opened("".join(parts))
    for text in ("s3://b/runs/<i>", "2.00e-06", "100.0%", "1.23 MB", "DPOFlow/2", "abababababab", "a<b>", "7 B"):
        assert text in opened.text, text
    assert not {"i", "script"} & set(opened.tags)


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (45_200, "45.2 kB"), (16_380_000_000, "16.4 GB")]
)
def test_sizes_are_powers_of_a_thousand(count, shown):
    assert markup.size(count) == shown
