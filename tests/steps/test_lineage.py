"""From an exported model back to the rows of every run that made it, and what became of them."""

import json
from pathlib import Path

import pytest

from posttrain import storage
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.errors import CheckpointError
from posttrain.workflow import registry
from runs import prepared, recipe_config
from steps.export import export, exported_facts
from steps.lineage import lineage

ROWS = [
    {"messages": [{"role": "user", "content": f"sort {n}"}, {"role": "assistant", "content": f"{n}"}]}
    for n in range(11, 19)
]


def exported(root: str, run: str, rows: Path, **changes) -> dict:
    """A run that did not train, over a file of rows; what it exported."""
    config = recipe_config("sft", **{"data.sources": str(rows), **changes})
    base = prepared(storage.join(root, "SFTFlow", run), config)
    found = export(
        config,
        root=str(base.root),
        model_uri=base.model_uri,
        provenance={"flow": "SFTFlow", "run_id": run, "config_sha256": "c" * 64, "seed": 0, "versions": {}},
        evaluation={"before": {"rows": 8, "loss": 2.0}, "after": {"rows": 8, "loss": 1.0}},
        tokenizer_sha256=BaseHFModelTokenizer(storage.fetch(base.model_uri)).fingerprint(),
        trained={"tokens_uri": base.tokens_uri, "ledger": {"digest": run}},
    )
    return found


def written(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_served_model_leads_back_to_runs_token_files_and_rows(root_uri: str, tmp_path: Path):
    first = exported(root_uri, "1", written(tmp_path / "one.jsonl", ROWS))
    start = {"model": {"fresh": None, "path": first["uri"]}}
    second = exported(root_uri, "2", written(tmp_path / "two.jsonl", ROWS[:5]), **start)
    where = storage.join(root_uri, "registry")
    made = registry.Candidate(run="SFTFlow/2", parent=None, model_uri=second["uri"], key="k")
    registry.promote(where, made)
    champion = registry.champion(where)
    assert champion is not None
    one, two = lineage(champion.model_uri)
    assert (one["run"], two["run"]) == ("SFTFlow/1", "SFTFlow/2")
    for run, name, count in ((one, "one.jsonl", 8), (two, "two.jsonl", 5)):
        assert (run["data"], run["tokens"]) == ("the same", "the same")
        (source,) = run["sources"]
        (file,) = source["files"]
        assert (source["key"], file["uri"], file["rows"]) == ("data.sources[0]", str(tmp_path / name), count)
        assert file["state"] == "the same" and set(run["sets"]) == {"held_out.parquet"}
        assert [shard["state"] for shard in run["shards"]] == ["the same"]
        assert run["shards"][0]["uri"].startswith(str(root_uri)) and run["shards"][0]["rows"] == count

    written(tmp_path / "one.jsonl", ROWS[:-1])
    (tmp_path / "two.jsonl").unlink()
    storage.remove_folder(two["tokens_uri"])
    one, two = lineage(second["uri"])
    assert one["sources"][0]["files"][0]["state"] == "changed", "its bytes are not those that were trained on"
    assert (one["tokens"], two["sources"][0]["files"][0]["state"], two["tokens"]) == ("the same", "gone", "gone")
    assert two["shards"] == []


def test_the_fingerprint_is_of_rows_and_not_of_where_they_lie(tmp_path: Path):
    prints = []
    for name, rows in (("a", ROWS), ("b", ROWS), ("c", ROWS[:5])):
        made = exported(str(tmp_path / name), "1", written(tmp_path / f"{name}.jsonl", rows))
        prints.append(exported_facts(made["uri"])["lineage"][-1]["data_fingerprint"])
    assert prints[0] == prints[1] != prints[2]


def test_a_folder_that_no_run_exported_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"lineage\.json does not exist: no run of posttrain exported"):
        lineage(str(tmp_path))
