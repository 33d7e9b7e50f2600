"""The data report, on the card and in a terminal: every number is there, and text from data stays text."""

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from posttrain.workflow import charts
from posttrain.workflow.data_report import cells, print_report
from posttrain.workflow.pages import data_page

HOSTILE = "[bold]x[/bold] \x1b[31m\x1b]0;t\x07 \u202e <script>y</script> </div>\r\n\n# head :smile: [/]"
EDGES, COUNTS = [1, 16, 32, 64], [7, 3, 1]


def source(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "name": f"data.sources[{number}]",
        "path": "s3://bucket/train.parquet",
        "fingerprint": "ab" * 32,
        "rows": 16_384,
        "format": "messages",
        "units": 11,
        "tokens": 5_000_000,
        "loss_tokens": 1_250_000.0,
        "unknown_tokens": 0,
        "duplicates": 1_234,
        "dropped": {},
        "examples": [],
        "share": 0.71,
        "weight": [[0, 1.0]],
        "epochs": 2.0,
        "quantiles": {"p0": 12, "p50": 301, "p90": 902, "p99": 4_003, "p100": 8_104},
        "lengths": {"edges": EDGES, "counts": COUNTS},
    } | changes


def report(*sources: dict[str, Any], **changes: Any) -> dict[str, Any]:
    documents = [{"source": i % len(sources), "tokens": 30, "trained": 10} for i in range(3)] if sources else []
    preview = [
        {"token": "2 +", "trained": False},
        {"token": " 2\n", "trained": True},
        {"token": "<eos>", "trained": True},
    ]
    return {
        "scope": "all rows",
        "tokenizer_sha256": "0123456789abcdef" * 4,
        "pack_tokens": 120,
        "predicted_fill": 0.994 if sources else None,
        "sources": list(sources),
        "prompts": {"prompts": {"prompts": 8_192, "tokens": 90_001, "longest": 21}},
        "preview": preview if sources else [],
        "packs": [{"documents": documents}] if sources else [],
    } | changes


DATA = {
    "rows": {"prompts": 8_192, "held_out": 512},
    "sha256": {"prompts.parquet": "cd" * 32, "held_out.parquet": "ef" * 32},
}


class Opened(HTMLParser):
    """The tags and the text of a fragment."""

    def __init__(self, fragment: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(fragment)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        if self.tags[-1] != "style":
            self.text += data


def card_text(found: dict[str, Any]) -> str:
    return Opened("".join(part for part in data_page(found, DATA) if isinstance(part, str))).text


def printed(found: dict[str, Any], *, coloured: bool = False, width: int = 120) -> str:
    """What a console of that width gets, its own colours included."""
    out = io.StringIO()
    colours = "truecolor" if coloured else None
    print_report(found, Console(file=out, width=width, force_terminal=coloured, color_system=colours))
    return out.getvalue()


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


SHOWN = {"card": card_text, "terminal": printed, "coloured": lambda r: without_colours(printed(r, coloured=True))}
shown = pytest.mark.parametrize("show", SHOWN.values(), ids=SHOWN)


@shown
def test_every_number_of_a_source_is_shown(show):
    text = show(report(source(0, dropped={"too_long": 3, "no_assistant_turn": 1_001}, examples=["x.jsonl:7: no"])))
    for part in (
        *("counts of all rows", "0123456789abcdef", "packs of 120 tokens", "99.4%", "data.sources[0]"),
        *("s3://bucket/train.parquet", "messages", "abababababababab", "16,384", "5,000,000", "25.0%", "71.0%"),
        *("1,234", "too long: 3", "no assistant turn: 1,001", "x.jsonl:7: no"),
        *("12", "301", "902", "4,003", "8,104", "75.0%", "3 documents", "90,001"),
    ):
        assert part in text, part
    assert text.index("no assistant turn") < text.index("too long"), "the most frequent reason first"


@shown
def test_a_schedule_an_endless_source_and_uncounted_duplicates_are_named(show):
    text = show(report(source(0, weight=[[0, 1.0], [5_000, 0.2]], epochs=None, duplicates=None, format=None)))
    for part in ("1 to 0.2 at draw 5,000", "no limit", "not counted", "format by columns"):
        assert part in text


@shown
@pytest.mark.parametrize(
    ("unknown", "says"), [(0, "0.0%"), (4, "<0.1%"), (50_000, "1.0%"), (50_001, "⚠ 1.0%"), (400_000, "⚠ 8.0%")]
)
def test_a_share_of_unknown_tokens_above_one_in_a_hundred_is_marked(show, unknown, says):
    text = show(report(source(0, unknown_tokens=unknown)))
    assert says in text
    assert ("⚠" in text) == ("⚠" in says)


@shown
def test_without_sources_only_the_prompt_sets_are_shown(show):
    text = show(report())
    assert "Prompt sets" in text and "90,001" in text
    for part in ("ources", "packs", "Lengths", "token by token", "None", "counts of"):
        assert part not in text, part


@shown
def test_a_source_that_was_not_drawn_yet_leaves_its_shares_out(show):
    unused = {"units": 0, "tokens": 0, "loss_tokens": 0.0, "quantiles": {}, "share": 0.0}
    lengths = {"lengths": {"edges": EDGES, "counts": [0, 0, 0]}}
    text = show(report(source(0), source(1, **unused, **lengths), preview=[], packs=[], predicted_fill=None))
    assert "data.sources[1]" in text and "nan" not in text and "None" not in text
    alone = show(report(source(0, **unused, **lengths), preview=[], packs=[], predicted_fill=None))
    assert "data.sources[0]" in alone and "token by token" not in alone and "first packs" not in alone


def hostile() -> dict[str, Any]:
    texts = {"name": HOSTILE, "path": HOSTILE, "dropped": {HOSTILE: 1}, "examples": [HOSTILE]}
    return report(source(0, **texts), preview=[{"token": HOSTILE, "trained": True}])


def test_hostile_text_is_no_markup_on_the_card():
    for part in data_page(hostile(), DATA):
        if isinstance(part, str):
            assert "script" not in Opened(part).tags
            assert not re.search(r"[\n\r\x1b\u202e]", part)
            assert part.count("<div") == part.count("</div>")


def test_hostile_text_is_no_escape_code_and_no_markup_in_the_terminal():
    plain = printed(hostile(), width=400)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", plain)
    assert plain.count("[bold]x[/bold]") >= 3 and ":smile:" in plain and "\\x1b[31m" in plain
    coloured = without_colours(printed(hostile(), coloured=True, width=400))
    assert "\x1b" not in coloured and "\x07" not in coloured


@pytest.mark.parametrize("sources", [1, 2, 5])
def test_a_card_of_a_long_preview_and_many_short_documents_stays_small(sources):
    random = Random(7)
    packs = []
    for _ in range(8):
        lengths = [random.randint(1, 80) for _ in range(200)]
        documents = [{"source": random.randrange(sources), "tokens": n, "trained": n // 2} for n in lengths]
        packs.append({"documents": documents})
    preview = [{"token": " some\n text", "trained": i > 99} for i in range(2_000)]
    made = report(*map(source, range(sources)), packs=packs, preview=preview, pack_tokens=17_000)
    parts = data_page(made, DATA)
    assert sum(len((part if isinstance(part, str) else json.dumps(part)).encode()) for part in parts) < 200_000
    crowded = made | {
        "packs": [{"documents": [{"source": i % sources, "tokens": 1, "trained": 1} for i in range(17_000)]}]
    }
    assert sum(len(str(part)) for part in data_page(crowded, DATA)) < 200_000


def test_the_card_draws_the_lengths_of_every_source():
    (spec,) = (part for part in data_page(report(source(0), source(1)), DATA) if isinstance(part, dict))
    assert json.loads(json.dumps(spec, allow_nan=False)) == spec
    assert [layer["encoding"]["color"]["datum"] for layer in spec["layer"][:2]] == [
        "data.sources[0]",
        "data.sources[1]",
    ]


def test_length_chart_shows_every_unit_of_every_source_and_the_length_of_a_pack():
    sources = {
        "large": {"edges": [0, 16, 32, 64, 128], "counts": [0, 30, 10, 0]},
        "small": {"edges": [0, 16, 32, 64, 128], "counts": [1, 0, 0, 3]},
        "unused": {"edges": [0, 16, 32, 64, 128], "counts": [0, 0, 0, 0]},
    }
    spec = charts.length_chart("Lengths", sources, 256)
    assert spec is not None
    assert json.loads(json.dumps(spec, allow_nan=False)) == spec
    *areas, rule, label = spec["layer"]
    drawn = {a["encoding"]["color"]["datum"]: [tuple(v.values()) for v in a["data"]["values"]] for a in areas}
    assert drawn == {
        "large": [(16, 0.75, 30), (32, 0.25, 10), (64, 0.25, 10)],
        "small": [(1, 0.25, 1), (16, 0.0, 0), (32, 0.0, 0), (64, 0.75, 3), (128, 0.75, 3)],
    }
    assert rule["data"]["values"][0]["tokens"] == 256 and label["data"]["values"][0]["says"] == "a pack: 256"
    assert areas[0]["encoding"]["x"]["scale"]["domain"] == [1, 256]
    assert charts.length_chart("Lengths", {"unused": sources["unused"]}, 256) is None


def test_the_first_sources_have_colours_of_their_own():
    assert len({charts.source_colour(i) for i in range(7)}) == 7
    assert charts.source_colour(7) == charts.source_colour(100) == charts.GREY


def test_without_colours_brackets_and_capitals_tell_trained_from_read_only():
    text = printed(report(source(0), source(1)), width=80)
    assert "\x1b" not in text
    assert "2·+⟦·2⏎⟧\n⟦<eos>⟧" in text
    (strip,) = re.findall(r"^  1 (\S+)  75.0%, 3 documents$", text, re.MULTILINE)
    assert re.fullmatch(r"\|a+A+\|b+B+\|a+A+\.+", strip)
    assert strip.count(".") == pytest.approx(len(strip) / 4, abs=1)


def test_with_colours_trained_tokens_differ_in_colour():
    text = printed(report(source(0)), coloured=True)
    styles = {said: code for code, said in re.findall(r"\x1b\[([0-9;]*)m(2·\+|·2⏎|<eos>)\x1b", text)}
    assert "48;2;" in styles["·2⏎"] and "48;2;" in styles["<eos>"], "a background"
    assert "48;2;" not in styles["2·+"]
    assert "⟦" not in text


@shown
def test_a_long_preview_says_how_many_tokens_are_left_out(show):
    preview = [{"token": "r", "trained": False}] * 2_000 + [{"token": "T", "trained": True}] * 3_000
    text = " ".join(show(report(source(0), preview=preview)).split())
    before, after = (
        int(re.search(rf"([\d,]+) tokens {where}", text)[1].replace(",", "")) for where in ("before", "after")
    )
    assert before < 2_000 and after < 3_000 and "T" in text
    assert 5_000 - before - after <= 500


def test_the_histogram_has_a_row_for_every_filled_length_and_all_its_counts():
    lengths = {"lengths": {"edges": [1, 16, 32, 64, 128], "counts": [0, 30, 0, 15]}}
    text = printed(report(*(source(i, **lengths) for i in range(5))), width=80)
    rows = re.findall(r"^  (\d+) +((?:█* [\d,]+ *)+)$", text, re.MULTILINE)
    assert [edge for edge, _ in rows] == ["16", "32", "64"] * 2, "three sources beside each other, then two"
    bars = [[(len(bar), int(count)) for bar, count in re.findall(r"(█*) (\d+)", row)] for _, row in rows]
    assert [[count for _, count in row] for row in bars] == [[n] * k for k in (3, 2) for n in (30, 0, 15)]
    for longest, shorter in ((bars[0], bars[2]), (bars[3], bars[5])):
        assert longest[0][0] > 3
        assert shorter[0][0] == pytest.approx(longest[0][0] / 2, abs=0.5)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_nothing_is_wider_than_the_console_and_nothing_is_cut(width):
    long = source(0, path="s3://bucket/" + "x" * 300, examples=["y" * 300], dropped={"too_long": 1})
    text = printed(report(long, source(1), source(2), source(3)), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("x") >= 300 and text.count("y") >= 300 and "…" not in text


@given(
    lengths=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 40)), max_size=8),
    width=st.integers(1, 90),
)
def test_cells_show_the_token_in_their_middle(lengths, width):
    documents = [{"source": s, "tokens": n, "trained": min(n, trained)} for s, n, trained in lengths]
    tokens = [
        (document["source"], i >= document["tokens"] - document["trained"])
        for document in documents
        for i in range(document["tokens"])
    ]
    tokens += [None] * (320 - len(tokens))
    found = cells(documents, 320, width)
    assert [cell and cell[:2] for cell in found] == [tokens[(2 * i + 1) * 320 // (2 * width)] for i in range(width)]
    marked = sum(1 for cell in found if cell and cell[2])
    assert marked == sum(document["tokens"] * width >= 3 * 320 for document in documents)


def test_printing_a_report_needs_no_metaflow():
    code = "import sys, posttrain.workflow.data_report; print({'metaflow', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("width", [50, 60, 80, 200])
def test_names_of_three_sources_stand_whole_on_a_terminal_of_any_width(width):
    text = printed(report(*(source(number) for number in range(3))), width=width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    histograms = [line for line in text.splitlines() if line.strip().startswith("from")]
    assert re.findall(r"data\.sources\[\d\]", "".join(histograms)) == [f"data.sources[{n}]" for n in range(3)]
    for number in ("16,384", "5,000,000", "8,104", "4,003"):
        assert text.count(number) >= 3, number
