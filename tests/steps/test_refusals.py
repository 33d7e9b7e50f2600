"""What plan, prepare and tokenize refuse, each by its row or key."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from posttrain import storage
from posttrain.config import RunConfig
from posttrain.config_file import load_config
from posttrain.errors import ConfigError, DataError
from posttrain.manifest import read_manifest
from runs import prepared, small_config
from steps.plan import plan
from steps.prepare import prepare


def with_rows(tmp_path: Path, **files: list[dict[str, Any]]) -> RunConfig:
    """The small run with sources from JSONL files of the given rows."""
    changes = {}
    for name, rows in files.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes[f"data.{name}"] = str(path)
    return small_config(**changes)


@pytest.mark.parametrize("held_out", [{"prompt": "sort 12"}, {"messages": [{"role": "user", "content": "sort 12"}]}])
@pytest.mark.parametrize("trained", [{"prompt": "sort 12"}, {"messages": [{"role": "user", "content": "sort 12"}]}])
def test_a_held_out_question_is_found_in_either_form(tmp_path: Path, trained: dict, held_out: dict):
    config = with_rows(tmp_path, prompts=[{"prompt": "sort 99"}, trained], held_out=[held_out])
    with pytest.raises(DataError, match=r"data\.prompts: .*prompts\.jsonl:2: repeats a held-out question"):
        prepare(config, root=str(tmp_path / "run"))


def test_a_row_without_a_question_is_named(tmp_path: Path):
    config = with_rows(tmp_path, prompts=[{"prompt": "sort 99"}, {"answer": "?"}], held_out=[{"prompt": "x"}])
    with pytest.raises(DataError, match=r"data\.prompts: .*prompts\.jsonl:2: .*answer"):
        prepare(config, root=str(tmp_path / "run"))


def test_a_prompt_that_holds_its_answer_is_refused(tmp_path: Path):
    chat = [{"role": "user", "content": "sort 21"}, {"role": "assistant", "content": "12"}]
    config = with_rows(tmp_path, prompts=[{"prompt": "sort 99"}, {"messages": chat}], held_out=[{"prompt": "x"}])
    with pytest.raises(DataError, match=r"data\.prompts: .*prompts\.jsonl:2: .*a prompt ends with a user or tool turn"):
        prepared(tmp_path / "run", config)


def test_a_run_may_start_from_the_files_of_another_and_leaves_them_alone(tmp_path: Path):
    first = prepare(small_config(), root=str(tmp_path / "first"))["model"]["uri"]
    before = read_manifest(first)
    config = small_config(**{"model.fresh": None, "model.path": first})
    second = prepare(config, root=str(tmp_path / "second"))["model"]["uri"]
    assert read_manifest(first) == before
    storage.fetch(first)
    assert Path(second, "model.safetensors").read_bytes() == Path(first, "model.safetensors").read_bytes()


def test_plan_finds_a_model_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    config = small_config(**{"model.fresh": None, "model.path": "~/model", "checkpoint.root": str(tmp_path / "runs")})
    with pytest.raises(ConfigError, match=r"model\.path: ~/model has no config\.json"):
        plan(config, flow="F", run_id="1")
    (tmp_path / "model" / "config.json").write_text("{}")
    found = plan(config, flow="F", run_id="1")
    assert found["root"] == str(tmp_path / "runs" / "F" / "1")
    assert load_config(Path(found["root"], "config.json").read_text()) == config, "the run keeps its resolved config"


def test_a_refused_plan_leaves_nothing(tmp_path: Path):
    config = small_config(**{"data.prompts": "nowhere.jsonl", "checkpoint.root": str(tmp_path / "runs")})
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl does not exist"):
        plan(config, flow="F", run_id="1")
    assert not os.path.exists(tmp_path / "runs" / "F" / "1")


def test_a_hub_revision_is_a_full_commit():
    with pytest.raises(ConfigError, match=r"model\.revision: write the full commit, 40 hex digits"):
        small_config(**{"model.fresh": None, "model.path": "Qwen/Qwen3-0.6B", "model.revision": "main"})


def test_a_model_whose_heads_the_ranks_cannot_share_is_refused(tmp_path: Path):
    changes = {"parallel.data": 2, "parallel.tensor": 4, "checkpoint.root": str(tmp_path / "runs")}
    with pytest.raises(ConfigError, match=r"parallel\.tensor = 4 does not divide the model's 2 key and value heads"):
        plan(small_config(**changes), flow="F", run_id="1")
    with pytest.raises(ConfigError, match=r"parallel\.expert = 2 splits experts, and the model has none"):
        plan(small_config(**changes | {"parallel.tensor": 1, "parallel.expert": 2}), flow="F", run_id="1")


def test_a_model_whose_sides_float8_cannot_read_is_refused(tmp_path: Path):
    changes = {"optim.precision": "float8", "parallel.gpus_per_node": 2, "checkpoint.root": str(tmp_path / "runs")}
    with pytest.raises(ConfigError, match=r"multiples of 16, and the model's hidden size are 40 wide on a rank"):
        plan(small_config(**changes | {"model.fresh.hidden_size": 40}), flow="F", run_id="1")
