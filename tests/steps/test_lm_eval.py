"""eval.lm_eval is told of the folder that the run exports: its bytes, and with the real package its numbers."""

import json
import sys
from pathlib import Path

import pytest

from lm_eval_task import INSTALLED, own_task
from posttrain import storage
from posttrain.config import RunConfig
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.workflow.lm_eval_tasks import run_lm_eval
from runs import Prepared, prepared, recipe_config
from steps.evaluate import evaluate, tasks_of_export
from steps.export import export
from steps.model_card import README
from steps.origin import LINEAGE

STAND_IN = """
import hashlib, json, pathlib

def simple_evaluate(*, model_args, tasks, **_):
    folder = pathlib.Path(model_args["pretrained"])
    files = [path for path in folder.rglob("*") if path.is_file()]
    read = {{path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}}
    pathlib.Path({seen!r}).write_text(json.dumps(read))
    results = {{task: {{"alias": task, "acc,none": 0.5, "acc_stderr,none": "N/A"}} for task in tasks}}
    return {{"results": results, "n-samples": {{task: {{"original": 4, "effective": 4}} for task in tasks}}}}
"""
"""Of the package, where it is not installed: it writes down which bytes it was given."""


def exported(config: RunConfig, base: Prepared, evaluation: dict) -> Path:
    """What the step export leaves of a model that was not trained."""
    found = export(
        config,
        root=str(base.root),
        model_uri=base.model_uri,
        provenance={"flow": "SFTFlow", "run_id": "1", "config_sha256": "c" * 64, "seed": 0, "versions": {"torch": "2"}},
        evaluation=evaluation,
        tokenizer_sha256=BaseHFModelTokenizer(base.model_uri).fingerprint(),
    )
    return storage.fetch(found["uri"])


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the stand-in writes: file -> sha256."""
    package, seen = tmp_path / "packages" / "lm_eval", tmp_path / "seen.json"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN.format(seen=str(seen)))
    (package / "tasks.py").write_text("class TaskManager:\n    all_tasks = ['arc']\n    def __init__(self, **_): ...\n")
    for name in _loaded():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(package.parent)
    yield seen
    for name in _loaded():
        del sys.modules[name]


def _loaded() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] == "lm_eval"]


def test_lm_eval_reads_byte_for_byte_what_is_exported(tmp_path: Path, seen: Path):
    config = recipe_config("sft", **{"eval.lm_eval": ["arc"]})
    base = prepared(tmp_path / "run", config)
    of_tasks = tasks_of_export(config, base.model_uri)
    assert of_tasks == {"arc": {"rows": 4, "acc": 0.5}}
    folder = exported(
        config, base, {name: {"rows": 8, "loss": 2.0, "lm_eval": of_tasks} for name in ("before", "after")}
    )
    files, read = storage.manifest_of(str(folder))["files"], json.loads(seen.read_text())
    assert read == {name: entry["sha256"] for name, entry in files.items() if name not in (README, LINEAGE)}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(read)
    assert "| arc | 4 | acc | 0.5 | 0.5 |" in (folder / README).read_text()
    assert not list(base.root.glob("*exported*")), "the folder is gone again"


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed")
def test_the_evaluation_tells_what_lm_eval_says_of_the_export(tmp_path: Path):
    config = recipe_config("sft", **{"eval.lm_eval": [own_task(tmp_path, rows=9)]})
    base = prepared(tmp_path / "run", config)
    found = evaluate(config, tokens_uri=base.tokens_uri, models={"before": base.model_uri, "after": base.model_uri})
    folder = exported(config, base, found)
    assert found["after"]["lm_eval"] == run_lm_eval(str(folder), config.eval.lm_eval)
    assert (
        found["after"]["lm_eval"]["sorting"]["rows"] == 9 and "| sorting | 9 | acc |" in (folder / README).read_text()
    )
