"""What older code wrote opens for ever: every kind of file of a run, kept in tests/golden as it was written then."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors import tiny_engine
from golden_run import STEPS, one_rank, train, units_of, weights_digest
from posttrain.compute.committed import open_checkpoint
from posttrain.compute.shard_file import read_parts
from posttrain.data.token_files import read_units
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.manifest import verify_folder
from posttrain.workflow.ledger import Ledger
from posttrain.workflow.ledger_file import read_ledger
from posttrain.workflow.registry import champion
from saves import checkpoints

FOLDERS = sorted((Path(__file__).parent / "golden").glob("run_format_*"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def golden(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def expected(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "expected.json").read_text())


@pytest.mark.fault("F23", outcome="RESUME")
def test_training_goes_on_from_an_old_checkpoint_as_it_did_then(golden: Path, expected: dict[str, Any]):
    found = checkpoints(golden / "checkpoints" / "sft").latest()
    assert found is not None and found.step == STEPS
    engine = tiny_engine(str(golden / "model"), one_rank())
    tensors = engine.state_to_fill()
    found.index.check_same(tensors, where=found.uri)
    read_parts(found.folder, found.index.stored(), tensors)
    engine.filled()
    assert weights_digest(engine) == expected["weights"], "bytes are read, so every bit is there"
    # Computed, so another torch or another processor may round otherwise.
    assert train(engine, STEPS) == pytest.approx(expected["next_loss"], rel=1e-5)


@pytest.mark.fault("F23", outcome="RESUME")
def test_the_ledger_of_an_old_checkpoint_goes_on(golden: Path, expected: dict[str, Any]):
    (uri,) = (golden / "checkpoints" / "sft").glob("step_*")
    state = open_checkpoint(str(uri)).state
    assert Ledger(state["ledger"]).digest == expected["ledger"] and state["history"] == expected["losses"]
    rows = read_ledger(str(golden / "ledger" / "sft.jsonl"))
    assert [row["step"] for row in rows] == list(range(STEPS)) and rows[-1]["digest"] == expected["ledger"]


@pytest.mark.fault("F23", outcome="RESUME")
def test_an_old_published_model_is_proved_and_its_tokenizer_writes_the_same_ids(golden: Path, expected: dict[str, Any]):
    assert verify_folder(golden / "model")["licence"] == "Apache-2.0"
    tokenizer = BaseHFModelTokenizer(golden / "model")
    said = [{"role": "user", "content": "21"}, {"role": "assistant", "content": "12"}]
    assert tokenizer.conversation(said)[0] == expected["ids"]
    assert tokenizer.fingerprint() == expected["tokenizer"]


@pytest.mark.fault("F23", outcome="RESUME")
def test_old_token_files_hold_the_same_units(golden: Path):
    for old, now in zip(read_units(golden / "tokens" / "units.parquet"), units_of(0), strict=True):
        for before, after in zip(old, now, strict=True):
            assert np.array_equal(before.input_ids, after.input_ids)
            assert np.array_equal(before.target_ids, after.target_ids)
            assert np.array_equal(before.loss_mask, after.loss_mask)


@pytest.mark.fault("F23", outcome="RESUME")
def test_an_old_registry_names_its_champion(golden: Path, tmp_path: Path):
    shutil.copytree(golden / "registry", tmp_path / "registry")
    found = champion(str(tmp_path / "registry"))
    assert found is not None and (found.version, found.generation) == (1, 1)
    assert found.manifest["run"] == "SFTFlow/1"
    verify_folder(found.model_uri)


def test_there_is_an_old_run():
    assert FOLDERS
