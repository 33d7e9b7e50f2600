"""Ray for the step that is running, on whatever the step was given: a laptop, one node, or a gang of nodes."""

import logging
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from posttrain.compute import reaper
from posttrain.errors import ComputeError
from posttrain.notice import stop_once

DONE = b"done"
LEAVING = b"leaving"
"""From a node that is about to be taken away, to node 0, which can save."""

LOOPBACK = "127.0.0.1"

LOCAL_JOIN_S = 120.0
"""For nodes that are processes of this machine, started together: seconds, not a scheduler's half hour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gang:
    """The nodes of one step."""

    num_nodes: int = 1
    node_index: int = 0
    main_ip: str = LOOPBACK
    key: str = ""
    """Same on every node of this attempt, different for any other run: run/step/attempt."""


@contextmanager
def ray_cluster(gang: Gang, *, num_cpus: int, num_gpus: int, join_timeout_s: float = 1800) -> Iterator[bool]:
    """Bring up Ray inside a step and tear it down with it.

    Yields True on the one node that drives the work, False on nodes that lend their
    hardware; those stay inside until node 0 is through and fail if it fails. Ray runs on
    loopback on a single node, has no dashboard, asks for a token that only this
    process knows, and nothing of it outlives this process (see reaper.py).

    A SIGTERM to any node is a SIGTERM to node 0, on which its program saves and stops; the node that got it works on
    until then. A second one ends it.
    """
    with _reaped():
        yield from _cluster(gang, num_cpus, num_gpus, join_timeout_s)


def _cluster(gang: Gang, num_cpus: int, num_gpus: int, join_timeout_s: float) -> Iterator[bool]:
    if "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != "token":
        raise ComputeError(
            "ray was imported before the cluster came up, so it would not read the cluster's token; "
            "import it inside functions in plug-ins"
        )
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # one process a CPU, which no actor of ours can take
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # do not hide GPUs from CPU actors, nor warn of it
    if gang.num_nodes == 1:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray keeps the first one it reads
        _stay_on_loopback()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _init(address="local", num_cpus=num_cpus, num_gpus=num_gpus)
        try:
            yield True
        finally:
            _shutdown()
        return
    if "RAY_AUTH_TOKEN" not in os.environ:
        raise ComputeError("several nodes need one RAY_AUTH_TOKEN in the environment of all, from a secret")
    join = _head if gang.node_index == 0 else _worker
    if gang.main_ip == LOOPBACK:
        join_timeout_s = min(join_timeout_s, LOCAL_JOIN_S)
    with join(gang, join_timeout_s, [f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}"]):
        yield gang.node_index == 0


@contextmanager
def _reaped() -> Iterator[None]:
    """Mark every process started inside, and leave a watcher that ends them should this one die."""
    mark = uuid.uuid4().hex
    os.environ.pop(reaper.MARK, None)
    command = [sys.executable, "-I", reaper.__file__, mark]
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    os.environ[reaper.MARK] = mark
    try:
        yield
    finally:
        del os.environ[reaper.MARK]
        assert watcher.stdin is not None, "the watcher was started with a pipe"
        watcher.stdin.close()


def _init(**options) -> None:
    import ray

    try:
        ray.init(include_dashboard=False, logging_level=logging.WARNING, log_to_driver=True, **options)
    except Exception as error:  # a bare one, of which only the text says what it is
        if "timed out during startup" not in str(error):
            raise
        load = " ".join(f"{each:.0f}" for each in os.getloadavg())
        raise ComputeError(
            f"Ray did not start within its 30 s (load {load} on {os.cpu_count()} cores). "
            "Fix: start the run again when the machine is less busy; it goes on from its last checkpoint"
        ) from error


def _stay_on_loopback() -> None:
    """Have Ray take 127.0.0.1 as this node's address, as it does by itself on macOS and Windows.

    On Linux it replaces 127.0.0.1 by the machine's own address and listens on every
    interface (ray 2.60, services.resolve_ip_for_localhost); this is its own switch. Drop
    when ray.init(_node_ip_address="127.0.0.1") is honoured.
    """
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False


def _shutdown() -> None:
    import ray

    ray.shutdown()


@contextmanager
def _head(gang: Gang, timeout_s: float, flags: list[str]) -> Iterator[None]:
    """Start the Ray head, wait for every node, and tell the others how it ended."""
    import ray

    ip, port = gang.main_ip, _port(gang)
    head = ["--head", f"--node-ip-address={ip}", f"--port={port}", "--include-dashboard=false", *flags]
    with socket.create_server((ip, port + 1)) as door, _ray_daemon(head) as daemon:
        peers = _peers(door, gang, timeout_s, daemon)
        _until(lambda: _answers(ip, port), timeout_s, "the Ray head to answer")
        _init(address=f"{ip}:{port}")
        _until(
            lambda: sum(node["Alive"] for node in ray.nodes()) == gang.num_nodes,
            timeout_s,
            f"{gang.num_nodes} nodes to join Ray",
        )
        over = threading.Event()
        threading.Thread(target=_hear, args=(peers, over), name="gang", daemon=True).start()
        try:
            yield
            over.set()
            for peer in peers:
                peer.sendall(DONE)
        finally:
            over.set()
            for peer in peers:
                peer.close()  # a worker that sees the end without DONE fails at once
            _shutdown()


def _hear(peers: list[socket.socket], over: threading.Event) -> None:
    """A node that says that it leaves is a SIGTERM to this process; what ends without a word is told by Ray."""
    open_ones = list(peers)
    while open_ones and not over.wait(0):
        try:
            for peer in select.select(open_ones, [], [], 1)[0]:
                if peer.recv(len(LEAVING), socket.MSG_WAITALL) == LEAVING:
                    stop_once(f"the node at {peer.getpeername()[0]} is about to be taken away")
                open_ones.remove(peer)
        except (OSError, ValueError):  # closed under us: the gang is through
            return


def _peers(door: socket.socket, gang: Gang, timeout_s: float, daemon: subprocess.Popen) -> list[socket.socket]:
    """A connection from every other node: it closes when that node's step ends, in whatever way."""
    peers: list[socket.socket] = []
    deadline = time.monotonic() + timeout_s
    while len(peers) < gang.num_nodes - 1:
        if daemon.poll() is not None:
            raise ComputeError(f"the Ray head exited with code {daemon.returncode} before the nodes had joined")
        if time.monotonic() > deadline:
            raise ComputeError(
                f"{len(peers) + 1} of {gang.num_nodes} nodes came within {timeout_s:g} s; the others never started "
                "their step or could not reach this one, see their logs"
            )
        if select.select([door], [], [], 1)[0]:
            peers.append(door.accept()[0])
    return peers


@contextmanager
def _worker(gang: Gang, timeout_s: float, flags: list[str]) -> Iterator[None]:
    """Lend this node to the head until it says that it is done."""
    ip, port = gang.main_ip, _port(gang)
    _until(lambda: _answers(ip, port), timeout_s, f"the Ray head at {ip}:{port}")
    with socket.create_connection((ip, port + 1)) as head, _ray_daemon([f"--address={ip}:{port}", *flags]) as daemon:
        with _leaving(head):
            yield
            while not select.select([head], [], [], 5)[0]:
                if daemon.poll() is not None:
                    raise ComputeError(f"Ray on node {gang.node_index} exited with code {daemon.returncode}")
        if head.recv(len(DONE)) != DONE:
            raise ComputeError(f"node 0 ({ip}) stopped before the work was done; see its log")


@contextmanager
def _leaving(head: socket.socket) -> Iterator[None]:
    """The first SIGTERM tells node 0, which saves while this node's ranks are still there; the second one ends it."""

    def tell(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"telling node 0, which saves and stops; again ends at once\n")
        with suppress(OSError):  # node 0 is gone, which is found out by whoever reads
            head.sendall(LEAVING)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, tell)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _ray_daemon(arguments: list[str]) -> Iterator[subprocess.Popen]:
    """`ray start --block`: one SIGTERM takes down all that it started."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *arguments]
    daemon = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield daemon
    finally:
        daemon.terminate()
        daemon.wait()


def _port(gang: Gang) -> int:
    """Equal on every node of this attempt; other runs on a shared machine get others."""
    return 20000 + 2 * (zlib.crc32(gang.key.encode()) % 5000)


def _answers(ip: str, port: int) -> bool:
    try:
        socket.create_connection((ip, port), timeout=5).close()
    except OSError:
        return False
    return True


def _until(ready: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise ComputeError(f"waited {timeout_s:g} s for {what}")
        time.sleep(1)
