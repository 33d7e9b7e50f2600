"""The warm-up killed and resumed on the stream: the same global batches, whoever computes them and on however many
ranks."""

from pathlib import Path
from typing import Any

import pytest

from posttrain.config import RunConfig
from posttrain.workflow.ledger_file import read_ledger
from runs import Prepared, metrics, prepared, result_of, run_step, small_config, steps_again, steps_done
from steps.audit import audit

STEPS = 12
"""Steps of 40 packs: a window is four of them, so the kills lie in different windows."""


def config_of(how: str, ranks: int) -> RunConfig:
    return small_config(
        **{
            "data.tokenize": how,
            "warmup.num_steps": STEPS,
            "warmup.packs_per_step": 40,
            "parallel.data": ranks,
            "checkpoint.every_steps": 2,
        }
    )


@pytest.fixture(scope="module", params=["online", pytest.param("ahead", marks=pytest.mark.slow)])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Prepared]:
    return request.param, prepared(tmp_path_factory.mktemp("inputs"), config_of(request.param, 2))


ONLINE = pytest.mark.parametrize("base", ["online"], indirect=True)
"""Where test_stops.py and test_audit.py do the same to rows that were tokenised ahead."""


def train(base: tuple[str, Prepared], folder: Path, *, ranks: int, fault: str | None = None):
    how, made = base
    inputs = {"root": str(folder), "model_uri": made.model_uri, "tokens_uri": made.tokens_uri}
    return run_step("train", config_of(how, ranks), folder, fault=fault, **inputs)


@pytest.fixture(scope="module")
def uninterrupted(base: tuple[str, Prepared], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    result = result_of(train(base, folder, ranks=2))
    return {"ledger": result["ledger"], "rows": read_ledger(f"{folder}/ledger/warmup.jsonl"), "folder": folder}


@pytest.mark.fault("F13", outcome="RESUME")
def test_two_kills_and_one_two_and_four_ranks_train_the_same_global_batches(
    base: tuple[str, Prepared], uninterrupted: dict[str, Any], tmp_path: Path, record_property
):
    assert train(base, tmp_path, ranks=1, fault="loop.before_train@4").returncode == -9
    done = steps_done(tmp_path, "warmup")
    second = train(base, tmp_path, ranks=2, fault="loop.before_train@6")
    assert second.returncode == -9 and f"warmup: continuing after step 2 of {STEPS}" in second.stdout
    lost, done = steps_again(done, second), steps_done(tmp_path, "warmup")
    last = train(base, tmp_path, ranks=4)
    record_property("lost_steps", max(lost, steps_again(done, last)))
    assert f"warmup: continuing after step 6 of {STEPS}" in last.stdout
    assert result_of(last)["ledger"] == uninterrupted["ledger"]
    assert read_ledger(f"{tmp_path}/ledger/warmup.jsonl") == uninterrupted["rows"]
    assert len({row["digest"] for row in uninterrupted["rows"]}) == STEPS


@ONLINE
@pytest.mark.slow
@pytest.mark.fault("F1", outcome="RESUME")
def test_a_kill_on_the_same_ranks_resumes_bitwise(
    base: tuple[str, Prepared], uninterrupted: dict[str, Any], tmp_path: Path
):
    assert train(base, tmp_path, ranks=2, fault="loop.before_train@8").returncode == -9
    result_of(train(base, tmp_path, ranks=2))
    expected = uninterrupted["folder"]
    weights = [(folder / "warmup_model" / "model.safetensors").read_bytes() for folder in (tmp_path, expected)]
    assert weights[0] == weights[1]
    assert metrics(tmp_path / "metrics" / "warmup.jsonl") == metrics(expected / "metrics" / "warmup.jsonl")


@ONLINE
@pytest.mark.slow
def test_the_audit_recomputes_every_batch_of_a_killed_run(
    base: tuple[str, Prepared], uninterrupted: dict[str, Any], tmp_path: Path
):
    _, made = base
    assert train(base, made.root, ranks=2, fault="loop.before_train@5").returncode == -9
    result_of(train(base, made.root, ranks=2))
    warmup = audit(str(made.root))["stages"]["warmup"]
    assert (warmup["steps"], warmup["replayed"]) == (STEPS, STEPS)
