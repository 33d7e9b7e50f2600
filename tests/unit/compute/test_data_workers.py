"""Windows computed by actors are the windows that a thread computes; their failures have a name."""

import os
import signal
from functools import partial

import pytest

from posttrain.compute.cluster import Gang, ray_cluster
from posttrain.compute.data_workers import window_workers
from posttrain.data.loader import loading
from posttrain.errors import ComputeError, DataError
from posttrain.workflow.ledger import Ledger
from runs import prepared, small_config
from steps.streams import open_stream


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Opens the stream of a run that tokenises online, in any process."""
    config = small_config(**{"data.tokenize": "online"})
    base = prepared(tmp_path_factory.mktemp("run"), config)
    with ray_cluster(Gang(), num_cpus=4, num_gpus=0):
        yield partial(open_stream, config, tokens_uri=base.tokens_uri, model_uri=base.model_uri)


def digests(make, works=(), *, state=None, batches=12):
    """The ledger's digest after each of some global batches of 50 packs: four windows in all, and the last state."""
    ledger, found = Ledger(), []
    with loading(make(), workers=works, state=state) as loader:
        for _ in range(batches):
            found.append(ledger.commit(loader.take(50), draws=[])["digest"])
        return found, loader.state()


@pytest.mark.fault("F14", outcome="CONTINUE")
def test_any_number_of_actors_gives_the_batches_of_one_thread(make):
    expected, end = digests(make)
    assert len(set(expected)) == 12 and end["window"] >= 3
    with window_workers(make, count=3, timeout_s=120) as works:
        assert digests(make, works) == (expected, end)
    _, middle = digests(make, batches=5)
    with window_workers(make, count=2, timeout_s=120) as works:
        assert digests(make, works, state=middle, batches=7)[1] == end


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


def has_no_data():
    raise DataError("x.parquet is not there")


class Refuses:
    def window(self, index):
        raise DataError(f"window {index}: x.parquet, block 3: its bytes are damaged")


@pytest.mark.parametrize(
    ("broken", "kind", "message"),
    [
        (dies, ComputeError, r"data worker 0 died during window\(\)"),
        (has_no_data, ComputeError, "data worker 0 died during window.*x.parquet is not there"),
        (Refuses, DataError, r"^window 0: x\.parquet, block 3: its bytes are damaged$"),
    ],
)
def test_an_actor_that_fails_is_named_or_its_own_error_comes_through(make, broken, kind, message):
    with window_workers(broken, count=1, timeout_s=120) as works, pytest.raises(kind, match=message):
        digests(make, works)


def test_a_window_that_does_not_come_stops_the_loader(make, monkeypatch):
    monkeypatch.setattr("posttrain.data.loader.GRACE_S", 0.1)
    with (
        pytest.raises(ComputeError, match=r"window 0 of the data did not come in 0\.1 s"),
        loading(make(), workers=[_wait_for_ever], timeout_s=0.1) as loader,
    ):
        loader.take(1)


def _wait_for_ever(index):
    import threading

    threading.Event().wait()
