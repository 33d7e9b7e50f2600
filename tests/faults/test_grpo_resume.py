"""Kill -9 in the middle of training, then resume: the same metrics, ledger and weights as a run left alone."""

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch

from runs import TWO_RANKS, Prepared, metrics, prepared, result_of, run_step, small_config, steps_again, steps_done
from saves import files_of

CONFIG = small_config(**TWO_RANKS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("inputs"), CONFIG)


def grpo(base: Prepared, folder: Path, *, fault: str | None = None):
    inputs = {"root": str(folder), "model_uri": base.model_uri, "tokens_uri": base.tokens_uri}
    return run_step("grpo", CONFIG, folder, fault=fault, **inputs)


def outcome(folder: Path) -> dict[str, Any]:
    return {
        "metrics": metrics(folder / "metrics" / "grpo.jsonl"),
        "weights": (folder / "trained_model" / "model.safetensors").read_bytes(),
        "state": files_of(folder / "checkpoints" / "grpo" / "step_000006"),
    }


@pytest.fixture(scope="module")
def uninterrupted(base: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {"ledger": result_of(grpo(base, folder))["ledger"], **outcome(folder)}


@pytest.mark.parametrize(
    "fault",
    [
        "controller.before_train@1",
        pytest.param("controller.before_train@4", marks=pytest.mark.slow),
        pytest.param("controller.before_train@6", marks=pytest.mark.slow),
    ],
)
@pytest.mark.fault("F1", outcome="RESUME")
def test_driver_killed_between_steps_resumes_bitwise(
    base: Prepared, uninterrupted: dict, tmp_path: Path, fault: str, record_property
):
    killed = grpo(base, tmp_path, fault=fault)
    assert killed.returncode == -9
    done = steps_done(tmp_path, "grpo")
    resumed = grpo(base, tmp_path)
    record_property("lost_steps", steps_again(done, resumed))
    assert result_of(resumed)["ledger"] == uninterrupted["ledger"]
    assert outcome(tmp_path) == {k: v for k, v in uninterrupted.items() if k != "ledger"}


@pytest.mark.parametrize(
    ("fault", "who"),
    [
        pytest.param("engine.before_update.1@4", "policy 1 died during train_step", marks=pytest.mark.slow),
        pytest.param("engine.before_update.0@3", "policy 0 died during train_step", marks=pytest.mark.slow),
        pytest.param("policy.train_step.1@6", "policy 1 died during train_step", marks=pytest.mark.slow),
        pytest.param("checkpoint.after_snapshot.0@2", "policy 0 died during ", marks=pytest.mark.slow),
        pytest.param("checkpoint.after_tensors.1@2", "policy 1 died during ", marks=pytest.mark.slow),
    ],
)
@pytest.mark.fault("F1", outcome="RESUME")
def test_rank_killed_in_a_step_or_around_a_write_resumes_bitwise(
    base: Prepared, uninterrupted: dict, tmp_path: Path, fault: str, who: str, record_property
):
    record_property("lost_steps", _killed_rank_resumes(base, uninterrupted, tmp_path, fault=fault, who=who))


@pytest.mark.slow
@pytest.mark.fault("F2", outcome="RESUME")
def test_rank_killed_in_the_midst_of_its_second_write_resumes_bitwise(
    base: Prepared, uninterrupted: dict, tmp_path: Path, record_property
):
    parts = len(safetensors.torch.load(uninterrupted["state"]["rank_00001.safetensors"]))
    fault = f"checkpoint.mid_shard.1@{parts + parts // 2}"  # the place is passed once a part
    lost = _killed_rank_resumes(base, uninterrupted, tmp_path, fault=fault, who="policy 1 died during ")
    record_property("lost_steps", lost)


def _killed_rank_resumes(base: Prepared, uninterrupted: dict, tmp_path: Path, *, fault: str, who: str) -> int:
    """How many steps were trained again."""
    killed = grpo(base, tmp_path, fault=fault)
    assert killed.returncode != 0 and who in killed.stderr
    done = steps_done(tmp_path, "grpo")
    resumed = grpo(base, tmp_path)
    assert "continuing after step" in resumed.stdout
    assert outcome(tmp_path) == {k: v for k, v in uninterrupted.items() if k != "ledger"}
    assert not list((tmp_path / "checkpoints" / "grpo").glob("*.tmp-*"))
    return steps_again(done, resumed)


@pytest.mark.fault("F9", outcome="STOP")
def test_nothing_survives_a_killed_driver(base: Prepared, tmp_path: Path, record_property):
    grpo(base, tmp_path, fault="controller.before_train@1")
    start = time.monotonic()
    psutil.wait_procs(_ray_processes(tmp_path), timeout=60)  # Ray's agents look for their parent every few seconds
    assert not _ray_processes(tmp_path)
    record_property("detected_s", time.monotonic() - start)


def _ray_processes(folder: Path) -> list[psutil.Process]:
    """Live processes whose working folder is the killed run's: Ray's daemons and the actors inherit it."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == folder:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
