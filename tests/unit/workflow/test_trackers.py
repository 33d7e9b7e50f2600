"""What the trackers' own readers find after a run, and after one that was resumed."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain import storage
from posttrain.errors import ConfigError
from posttrain.workflow.trackers import MLflow, TensorBoard, WandB, flat, make_trackers
from posttrain.workflow.tracking import RunFacts, Tracker, tracked


def attempt(tracker: Tracker, folder: str, *, first: int, end: int, scale: float = 1.0) -> None:
    """Steps `first` to `end` of a run, after a resume at `first`."""
    config = {"optim": {"lr": 0.5}, "seed": 3}
    facts = RunFacts(run_id="F-1-grpo", name="F-1-grpo", folder=folder, config=config, first_step=0)
    with tracked({"tracker": tracker}, facts) as (observer,):
        observer.restore([{"step": step, "loss": float(step)} for step in range(first)])
        for step in range(first, end):
            observer.step({"step": step, "loss": step * scale})
        observer.note("rank 1 is slow")
    assert observer.counts["failed"] == observer.counts["dropped"] == 0


def scalars(folder: Path) -> dict[int, list[float]]:
    """Step -> its values of "loss" as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    found: dict[int, list[float]] = {}
    for event in read.Scalars("loss"):
        found.setdefault(event.step, []).append(event.value)
    return found


def test_tensorboard_shows_a_repeated_step_once_and_as_it_was_repeated(root_uri):
    attempt(TensorBoard(), root_uri, first=0, end=6, scale=1.0)
    attempt(TensorBoard(), root_uri, first=4, end=8, scale=10.0)
    uri = storage.join(root_uri, "tensorboard", "F-1-grpo")
    shown = scalars(storage.download(uri) if storage.is_s3(uri) else Path(uri))
    assert shown == {step: [step * (10.0 if step >= 4 else 1.0)] for step in range(8)}


def test_mlflow_continues_its_run_and_logs_no_step_twice(tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.chdir(tmp_path)  # texts go to ./mlruns, unless a server says where
    uri = f"sqlite:///{tmp_path}/runs.db"
    attempt(MLflow(uri), str(tmp_path), first=0, end=6)
    attempt(MLflow(uri), str(tmp_path), first=4, end=8)
    client = tracking.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("posttrain").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(step, float(step)) for step in range(8)]
    assert run.data.params == {"optim.lr": "0.5", "seed": "3"}
    assert run.info.status == "FINISHED"


def test_wandb_offline_writes_the_whole_history_in_every_attempt(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    attempt(WandB("posttrain"), str(tmp_path), first=0, end=6)
    (first,) = tmp_path.glob("wandb/offline-run-*")
    while time.strftime("%Y%m%d_%H%M%S") in first.name:  # W&B names a folder by the second, and would take it again
        time.sleep(0.05)
    attempt(WandB("posttrain"), str(tmp_path), first=4, end=8)
    (last,) = set(tmp_path.glob("wandb/offline-run-*")) - {first}
    expected = {step: float(step) for step in range(8)}
    deadline = time.monotonic() + 20  # W&B's writer is a process of its own, which may be behind run.finish()
    while (found := wandb_losses(next(last.glob("run-*.wandb")))) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found == expected


def wandb_losses(file: Path) -> dict[int, float]:
    """Step -> "loss" in the log of an offline run, which no public function reads."""
    from wandb.proto import wandb_internal_pb2

    found = {}
    for data in leveldb_log(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found |= {row["_step"]: row["loss"]} if "loss" in row else {}
    return found


def leveldb_log(log: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format after seven bytes of W&B's own: blocks of 32 KiB of fragments, each with
    checksum, length and kind (whole, first, middle, last)."""
    at, whole = 7, b""
    while at + 7 <= len(log):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", log[at : at + 7])
        whole = (b"" if kind in (1, 2) else whole) + log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole


def test_only_what_is_asked_for_is_made():
    nothing = {"tensorboard": False, "mlflow": None, "wandb": None, "custom": None}
    assert make_trackers(**nothing) == {}
    made = make_trackers(
        tensorboard=True, mlflow="http://h", wandb="p", custom="posttrain.workflow.trackers:TensorBoard"
    )
    assert [type(tracker) for tracker in made.values()] == [TensorBoard, MLflow, WandB, TensorBoard]


def test_a_tracker_of_ones_own_that_cannot_be_made_is_named():
    with pytest.raises(ConfigError, match=r"tracking\.custom: .*trackers:MLflow\(\) raised TypeError"):
        make_trackers(tensorboard=False, mlflow=None, wandb=None, custom="posttrain.workflow.trackers:MLflow")


def test_flat_keeps_empty_sections_and_lists():
    assert flat({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "a.d": {}, "e": [1]}
