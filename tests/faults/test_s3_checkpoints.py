"""Checkpoints on an S3 that fails: saved and read whole all the same, or a named error after a counted budget."""

import time

import pytest
import torch

from faulty_s3 import Fault, FaultyS3
from posttrain import s3, storage
from posttrain.compute.shard_file import read_parts, write_shard
from posttrain.compute.shards import Part
from posttrain.errors import StorageError
from saves import assert_is, checkpoints, outcome_of, reports_of, save, save_alone, tensors

QUICK = s3.Budget(total_s=60.0, first_wait_s=0.001, longest_wait_s=0.01)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(s3, "BUDGET", QUICK)


@pytest.mark.parametrize("percent", [0, 10, 50, 90])
@pytest.mark.fault("F17", outcome="CONTINUE")
def test_saves_and_restores_survive_a_share_of_failing_requests(proxy, s3_bucket, quick, percent):
    proxy.rate = percent / 100
    uri = f"{s3_bucket}/c"
    save_alone(uri, 1, 2, 3)
    assert_is(checkpoints(uri).latest(), 3)
    proxy.rate = 0.0
    assert storage.list_folders(uri) == ["step_000002", "step_000003"]
    assert (proxy.broken > 0) == (percent > 0)


@pytest.mark.fault("F17", outcome="CONTINUE")
def test_many_parts_of_one_shard_survive_failing_requests(proxy, s3_bucket, quick, monkeypatch):
    monkeypatch.setattr("posttrain.compute.shard_file.PIECE_BYTES", 1024 * 1024)
    monkeypatch.setattr("posttrain.compute.sinks.PART_BYTES", 5 * 1024 * 1024)
    held = {"model.large": torch.randn(4_000_000)}
    proxy.rate = 0.5
    with checkpoints(f"{s3_bucket}/c").writing() as saved:
        attempt = saved.begin(1, 1)
        reports = reports_of(held, attempt.folder)
        saved.commit(attempt, shapes={"model.large": (4_000_000,)}, reports=reports, state={})
    found = checkpoints(f"{s3_bucket}/c").latest()
    read = {"model.large": torch.zeros(4_000_000)}
    read_parts(found.folder, found.index.stored(), read)
    assert torch.equal(read["model.large"], held["model.large"]) and proxy.broken > 5


@pytest.mark.fault("F17", outcome="CONTINUE")
def test_a_store_that_stays_away_is_a_named_error_in_bounded_time_and_the_last_good_one_stays(
    proxy, s3_bucket, monkeypatch, record_property
):
    uri = f"{s3_bucket}/c"
    save_alone(uri, 1)
    monkeypatch.setattr(s3, "BUDGET", s3.Budget(total_s=0.5, first_wait_s=0.01, longest_wait_s=0.05))
    with checkpoints(uri).writing() as saved:
        attempt = saved.begin(2, 1)
        proxy.rate = 1.0
        start = time.monotonic()
        with pytest.raises(StorageError, match=r"writing s3://\S+/index\.json: given up after \d+ attempts"):
            saved.commit(attempt, shapes={}, reports=[], state={})
        record_property("detected_s", time.monotonic() - start)
        proxy.rate = 0.0
        assert_is(saved.latest(), 1)
        save(saved, 2)
    assert_is(checkpoints(uri).latest(), 2)


def test_a_rank_that_cannot_write_reports_it_and_training_may_go_on(s3_bucket, s3_server, monkeypatch):
    monkeypatch.setattr(s3, "BUDGET", s3.Budget(total_s=0.2, first_wait_s=0.01, longest_wait_s=0.05))
    with FaultyS3(s3_server) as gone:
        monkeypatch.setenv("METAFLOW_S3_ENDPOINT_URL", gone.address)
    outcome = outcome_of(tensors(1), f"{s3_bucket}/c")
    assert outcome["failed"].startswith(f"writing {s3_bucket}/c/rank_00000.safetensors: given up after ")


@pytest.mark.parametrize("where", ["/dev/full", "/proc/none"])
def test_a_disk_that_takes_no_byte_is_told_apart_from_a_mistake_of_ours(where):
    with pytest.raises(StorageError, match=f"{where}.*: (No space left on device|No such file)"):
        write_shard(where, {"w": (Part((0,), (3,)), torch.zeros(3))}, rank=0)


@pytest.mark.parametrize("fault", [Fault.RESET_IN_BODY, Fault.TRUNCATED, Fault.SERVER_ERROR])
@pytest.mark.fault("F18", outcome="CONTINUE")
def test_a_shard_whose_body_is_cut_is_read_again(proxy, s3_bucket, quick, fault):
    uri = f"{s3_bucket}/c"
    save_alone(uri, 1)
    proxy.script.extend([fault, fault, None])
    assert_is(checkpoints(uri).latest(), 1)
    assert proxy.faults == [fault, fault]
