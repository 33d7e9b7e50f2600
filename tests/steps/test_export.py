"""An export names the licence, data and runs that it comes from, and is read again from where it was uploaded."""

import json
from pathlib import Path

import pytest

from posttrain import storage
from posttrain.config import RunConfig
from posttrain.data.tokenizer import BaseHFModelTokenizer
from runs import prepared, recipe_config
from steps.export import export
from steps.model_card import licence_of
from tiny import tiny_model


def exported(config: RunConfig, root: str, run: str, local: Path) -> str:
    """The export of a run that did not train."""
    base = prepared(local, config)
    fingerprint = BaseHFModelTokenizer(base.model_uri).fingerprint()
    for name in ("data", "model", "tokens/all"):
        if root != str(local):
            storage.publish(local / name, f"{root}/{name}")
    facts = {"flow": "SFTFlow", "run_id": run, "config_sha256": "c" * 64, "seed": 0, "versions": {"torch": "2"}}
    found = export(
        config,
        root=root,
        model_uri=f"{root}/model",
        provenance=facts,
        evaluation={"before": {"rows": 8, "loss": 2.0}, "after": {"rows": 8, "loss": 1.0}},
        tokenizer_sha256=fingerprint,
        trained={"ledger": {"digest": "d" * 64}},
    )
    return found["uri"]


def from_path(path: Path | str) -> RunConfig:
    return recipe_config("sft", **{"model": {"fresh": None, "path": str(path)}, "data.pack_tokens": 128})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tiny_model(tmp_path / "tiny")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# A model\n")
    (folder / "LICENSE").write_text("Apache License")
    return folder


def test_a_licence_is_handed_on_from_run_to_run(tmp_path: Path, model: Path):
    first = exported(from_path(model), str(tmp_path / "one"), "1", tmp_path / "one")
    second = Path(exported(from_path(first), str(tmp_path / "two"), "2", tmp_path / "two"))
    card = (second / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\ntags:\n- posttrain\n- sft\n---\n")
    assert "- base model: apache-2.0" in card and (second / "LICENSE").read_text() == "Apache License"
    assert [run["run"] for run in json.loads((second / "lineage.json").read_text())] == ["SFTFlow/1", "SFTFlow/2"]
    manifest = storage.manifest_of(str(tmp_path / "two" / "data"))["files"]
    assert manifest["held_out.parquet"]["sha256"] in card and "| data.sources[0] | small_task:exact | 200 |" in card
    assert "d" * 40 in card and BaseHFModelTokenizer(second).fingerprint()[:40] in card


def test_an_unknown_licence_is_said_to_be_unknown(tmp_path: Path, model: Path):
    (model / "README.md").write_text("# no front matter\n---\n")
    folder = exported(from_path(model), str(tmp_path / "run"), "1", tmp_path / "run")
    card = Path(folder, "README.md").read_text()
    assert "license: unknown" in card and f"- base model: unknown: inherited from {model}, which names none" in card
    assert licence_of(folder) is None, "the next run knows no more"


@pytest.mark.parametrize(
    ("front", "licence"), [("license: [mit, other]", "mit, other"), ("license: {", None), ("", None)]
)
def test_front_matter_of_any_kind_is_read(tmp_path: Path, front: str, licence: str | None):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    (tmp_path / "config.json").write_text("{}")
    assert licence_of(str(tmp_path)) == licence
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    assert licence_of(str(tmp_path)) == (licence or "mit")


def test_an_upload_to_s3_is_fetched_again_and_compared(tmp_path: Path, s3_bucket: str, model: Path):
    root = f"{s3_bucket}/runs/SFTFlow/1"
    uri = exported(from_path(model), root, "1", tmp_path / "local")
    assert uri == f"{root}/export"
    found = storage.fetch(uri)
    assert (found / "model.safetensors").is_file() and (found / "LICENSE").is_file()
    assert "- base model: apache-2.0" in (found / "README.md").read_text()
