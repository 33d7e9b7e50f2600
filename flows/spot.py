"""A spot machine's notice becomes the SIGTERM on which a training step saves: `with heeding_spot_notices():`."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metaflow.sidecar import Sidecar

from placement import where_it_runs
from posttrain.notice import stop_once

NOTICE = Path("/tmp/spot_termination_notice")
"""Written by Metaflow's monitor, two minutes before AWS takes the machine away; a container has a /tmp of its own."""

EVERY_S = 1.0


@contextmanager
def heeding_spot_notices() -> Iterator[None]:
    """While inside, a notice is a SIGTERM to this process, in a container on Kubernetes or AWS Batch.

    Metaflow's monitor signals its own parent, which is its sidecar and not the task (2.19.39), so its file is watched
    here; on AWS Batch, where Metaflow starts no monitor, it is started too. Any node of a gang may get one: it tells
    node 0, which saves (posttrain/compute/cluster.py).
    """
    backend = where_it_runs().get("backend")
    if backend is None:
        yield
        return
    monitor = Sidecar("spot_termination_monitor") if backend == "batch" else None
    if monitor:
        monitor.start()
    over = threading.Event()
    threading.Thread(target=_watch, args=(over,), name="spot-notice", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        if monitor:
            monitor.terminate()


def _watch(over: threading.Event) -> None:
    while not over.wait(EVERY_S):
        if NOTICE.exists():
            stop_once("this spot machine is about to be taken away")
            return
