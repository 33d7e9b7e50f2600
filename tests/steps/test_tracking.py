"""Trackers of a real run: the same numbers as the metrics file over a kill and a resume, and no step lost to one."""

import json
from pathlib import Path

import pytest

from posttrain.errors import ConfigError
from runs import prepared, result_of, run_step, small_config
from steps.plan import plan


@pytest.mark.slow
def test_tensorboard_has_the_metrics_file_and_a_dead_tracker_stops_nothing(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small_config(
        **{"tracking.tensorboard": True, "tracking.custom": "small_task:DownTracker", "checkpoint.every_steps": 1}
    )
    base = prepared(tmp_path / "inputs", config)
    inputs = {"root": str(tmp_path / "F" / "1"), "model_uri": base.model_uri, "tokens_uri": base.tokens_uri}
    assert run_step("train", config, tmp_path, fault="loop.before_train@3", **inputs).returncode == -9
    resumed = run_step("train", config, tmp_path, **inputs)
    assert result_of(resumed)["steps"] == 4
    assert resumed.stdout.count("tracking.custom: ConnectionError: no route to host") == 1
    assert "tracking.custom: steps 0 logged, 4 failed, 0 dropped" in resumed.stdout
    rows = [json.loads(line) for line in (tmp_path / "F/1/metrics/warmup.jsonl").read_text().splitlines()]
    (folder,) = (tmp_path / "F/1/tensorboard").iterdir()
    assert folder.name.startswith("F-1-warmup-")
    read = EventAccumulator(str(folder))
    read.Reload()
    for name in ("loss", "grad_norm", "time/forward_s"):
        shown = [(event.step, event.value) for event in read.Scalars(name)]
        assert shown == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(tmp_path: Path):
    config = small_config(
        **{"tracking.mlflow": "http://127.0.0.1:1", "tracking.custom": "small_task:Nothing"},
        **{"checkpoint.root": str(tmp_path)},
    )
    with pytest.raises(
        ConfigError, match=r"tracking\.custom: small_task:Nothing: small_task has no 'Nothing'"
    ) as found:
        plan(config, flow="F", run_id="1")
    try:
        import mlflow  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        assert r"tracking.mlflow: mlflow is not installed. Fix: pip install 'posttrain[tracking]'" in str(found.value)


def test_a_password_in_an_address_is_refused():
    with pytest.raises(ConfigError, match=r"MLFLOW_TRACKING_PASSWORD"):
        small_config(**{"tracking.mlflow": "https://me:secret@mlflow.example.com"})
