"""The tokenize steps: shares, budgets and refusals over real files, and what a stream then gives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain import storage
from posttrain.data.source import Source
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.errors import DataError
from runs import Prepared, prepared, small_config
from steps.data_report import read_report
from steps.merge_tokens import merge_tokens
from steps.prepare import prepare
from steps.preview import preview
from steps.streams import open_stream, shares_of
from steps.tokenize import tokenize


def row(number: int, *, digits: str = "21", role: str = "assistant") -> dict[str, Any]:
    """A conversation that nothing else equals: the number is in its question and its answer."""
    return {
        "messages": [
            {"role": "user", "content": f"sort {digits} of {number}"},
            {"role": role, "content": f"{number} {''.join(sorted(digits))}"},
        ]
    }


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in rows))
    return str(path)


def answers(config, base: Prepared, windows: range) -> list[str]:
    """The trained text of every unit of some windows."""
    stream = open_stream(config, tokens_uri=base.tokens_uri, model_uri=base.model_uri)
    decode = BaseHFModelTokenizer(base.model_uri).decode
    packs = [pack for window in windows for pack in stream.window(window).packs]
    return [decode(s.target_ids[s.loss_mask > 0]) for pack in packs for s in pack.samples]


@pytest.mark.parametrize("how", ["ahead", "online"])
def test_each_source_is_trained_as_often_as_its_epochs_say(tmp_path: Path, how: str):
    one, two = [row(n) for n in range(100)], [row(n) for n in range(500, 530)]
    sources = [
        {"path": write(tmp_path / "one.jsonl", one), "epochs": 1},
        {"path": write(tmp_path / "two.jsonl", two), "epochs": 3, "weight": [[0, 0.5], [5000, 1]]},
    ]
    config = small_config(**{"data.sources": sources, "data.tokenize": how})
    base = prepared(tmp_path / "run", config)
    numbers = sorted(int(text.split()[0]) for text in answers(config, base, range(2)))
    assert numbers == sorted([*range(100), *[n for n in range(500, 530) for _ in range(3)]])
    report = read_report(base.tokens_uri)
    assert [source["units"] for source in report["sources"]] == ([100, 30] if how == "ahead" else [100, 90])
    assert report["sources"][0]["share"] == pytest.approx(100 / 190, abs=1e-3)
    assert 0.5 < report["predicted_fill"] <= 1


def test_shares_that_are_tokenised_apart_come_to_the_whole(tmp_path: Path):
    once = {"path": write(tmp_path / "rows.jsonl", [row(n) for n in range(50)]), "epochs": 1}
    together = small_config(**{"data.sources": once})
    base = prepared(tmp_path / "run", together)
    pq.write_table(pa.Table.from_pylist([row(n) for n in range(50)]), tmp_path / "rows.parquet", row_group_size=7)
    source = Source(str(tmp_path / "rows.parquet"), key="data.sources[0]")
    parts = shares_of([source], part_bytes=int(source.block_bytes[0]) * 2)
    assert len(parts) == 4 and parts[0] == [0, 0, 2] and parts[-1][2] == len(source.block_rows) == 8
    config = small_config(**{"data.sources": once | {"path": str(tmp_path / "rows.parquet")}})
    root = str(tmp_path / "apart")
    made = prepare(config, root=root)
    uris = {"root": root, "data_uri": made["data"]["uri"], "model_uri": made["model"]["uri"]}
    tokens = merge_tokens(config, **uris, parts=[tokenize(config, **uris, part=part) for part in parts])
    apart = Prepared(root=tmp_path / "apart", model_uri=made["model"]["uri"], tokens_uri=tokens["uri"])
    assert tokens["sources"][0]["units"] == 50
    assert sorted(answers(config, apart, range(1))) == sorted(answers(together, base, range(1)))
    assert len(set(answers(config, apart, range(1)))) == 50


def test_no_sources_is_one_empty_share():
    assert shares_of([]) == [[0, 0, 0]]


def test_bad_rows_are_counted_over_all_sources_and_the_budget_holds(tmp_path: Path):
    one = [row(0), row(1, role="bot"), row(2), '{"messages": [']
    two = [row(10), {"question": "x", "response": "y"}]
    paths = [write(tmp_path / "one.jsonl", one), write(tmp_path / "two.jsonl", two)]
    allowed = small_config(**{"data.sources": paths, "data.max_bad_rows": 3})
    base = prepared(tmp_path / "allowed", allowed)
    dropped = [source["dropped"] for source in read_report(base.tokens_uri)["sources"]]
    assert dropped == [{"unknown_role": 1, "not_json": 1}, {"unknown_format": 1}]
    assert {text.split()[0] for text in answers(allowed, base, range(1))} == {"0", "2", "10"}
    too_few = small_config(**{"data.sources": paths, "data.max_bad_rows": 2})
    with pytest.raises(DataError, match=r"3 bad rows \(.*max_bad_rows allows 2; .*data\.sources\[0\]: .*one\.jsonl:"):
        prepared(tmp_path / "too_few", too_few)


@pytest.mark.parametrize("how", ["ahead", "online"])
@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([row(0), row(1, role="bot")], {}, r"1 bad rows.*rows\.jsonl:2: .*bot.*\(unknown_role\)"),
        ([row(0, digits="3" * 200)], {}, r"data\.sources\[0\]: 1 of 1 rows are longer than a pack of 128 tokens"),
        ([row(0, digits="3" * 200)], {"data.over_long": "drop"}, r"none of its 1 rows is left to train on: 1 too_long"),
        (
            [row(0), {"messages": [{"role": "user", "content": "sort 12"}, {"role": "assistant", "content": "12"}]}],
            {"data.max_bad_rows": 99},
            r"data\.sources\[0\]: .*rows\.jsonl:2: repeats a held-out question",
        ),
    ],
)
@pytest.mark.fault("F28", "F32", "F35", "F39", outcome="REFUSE")
def test_what_cannot_be_trained_on_is_refused_before_training(
    tmp_path: Path, how: str, rows: list[dict], changes: dict, message: str
):
    held_out = write(tmp_path / "held_out.jsonl", [{"prompt": "sort 12", "answer": "12"}])
    sources = {"data.sources": {"path": write(tmp_path / "rows.jsonl", rows), "epochs": 1}, "data.held_out": held_out}
    with pytest.raises(DataError, match=message):
        prepared(tmp_path / "run", small_config(**sources, **changes, **{"data.tokenize": how}))


def test_a_repeated_share_keeps_what_is_published(tmp_path: Path):
    config = small_config()
    base = prepared(tmp_path, config)
    uris = {"root": str(tmp_path), "data_uri": str(tmp_path / "data"), "model_uri": base.model_uri}
    before = storage.manifest_of(str(tmp_path / "tokens" / "source_000_block_000000"))
    again = tokenize(config, **uris, part=[0, 0, 1])
    assert again["counts"]["rows"] == 200 and storage.manifest_of(again["uri"]) == before


@pytest.mark.fault("F37", outcome="REFUSE")
def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(tmp_path: Path):
    first = prepared(tmp_path / "first", small_config())
    model = Path(first.model_uri)
    tokenizer = BaseHFModelTokenizer(model)
    tokenizer.add_tokens([f"<item_{n}>" for n in range(3)])
    grown = tmp_path / "grown"
    grown.mkdir()
    for name in ("config.json", "model.safetensors"):
        (grown / name).write_bytes((model / name).read_bytes())
    tokenizer.save(grown)
    config = small_config(**{"model.fresh": None, "model.path": str(grown)})
    with pytest.raises(DataError, match=rf"writes ids up to {tokenizer.max_id}, .* has {tokenizer.max_id - 2} emb"):
        prepared(tmp_path / "second", config)


def test_a_preview_shows_what_the_run_will_train_on(tmp_path: Path):
    config = small_config(**{"data.tokenize": "online"})
    base = prepared(tmp_path, config)
    seen = preview(config)
    assert seen == read_report(base.tokens_uri) | {"sources": seen["sources"]}
    (one,), (other,) = seen["sources"], read_report(base.tokens_uri)["sources"]
    assert one == other


@pytest.mark.fault("F39", outcome="CONTINUE")
def test_copies_are_counted_and_shown(tmp_path: Path):
    rows = [row(1), row(2), row(1), row(3), row(1)]
    config = small_config(**{"data.sources": write(tmp_path / "rows.jsonl", rows)})
    base = prepared(tmp_path / "run", config)
    assert read_report(base.tokens_uri)["sources"][0]["duplicates"] == 2


def test_a_row_that_is_split_is_trained_whole(tmp_path: Path):
    digits = "".join(map(str, np.random.default_rng(0).integers(0, 10, 300)))
    rows = [row(0, digits=digits)]
    changes = {"data.sources": write(tmp_path / "rows.jsonl", rows), "data.over_long": "split"}
    config = small_config(**changes)
    base = prepared(tmp_path / "run", config)
    (source,) = read_report(base.tokens_uri)["sources"]
    assert source["units"] == 3 and source["duplicates"] == 0
    assert source["loss_tokens"] == len(rows[0]["messages"][1]["content"]) + 1, "each digit is a token, and the stop"
