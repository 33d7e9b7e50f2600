"""A whole GRPO flow seen from outside: what listens and where, and where the secrets of its environment end up."""

import contextlib
import gzip
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from runs import ROOT, SMALL, TWO_RANKS

MARK = "POSTTRAIN_TEST_RUN"
SECRETS = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "OPENAI_API_KEY", "MY_OWN")
LISTENS = "0A"
"""State of a listening socket in /proc/net/tcp (linux/include/net/tcp_states.h)."""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


@dataclass(frozen=True)
class Seen:
    """A finished run."""

    folder: Path
    ray: Path
    """Ray's own files."""
    canaries: dict[str, str]
    listening: dict[str, set[str]]
    """Address -> command lines of who listened on it."""
    talked_to: set[str]
    """Addresses that a connection was open to."""


def test_the_scan_finds_a_socket_that_listens_on_every_interface():
    program = "import socket, sys; s = socket.create_server(('', 0)); print('up', flush=True); sys.stdin.read()"
    mark = secrets.token_hex(8)
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {MARK: mark}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.readline()
        listening, _ = sockets(mark)
        assert list(listening) == ["0.0.0.0"]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("run")
    ray = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # a socket's path is at most 107 characters
    mark = secrets.token_hex(8)
    canaries = {name: f"canary{secrets.token_hex(12)}" for name in SECRETS}
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("METAFLOW_", "RAY_AUTH_TOKEN"))}
    environment |= canaries | {"PYTHONPATH": path, "METAFLOW_HOME": str(folder / "home"), "RAY_TMPDIR": str(ray)}
    changes = SMALL | TWO_RANKS | {"optim.num_steps": 2, "warmup.num_steps": 2}
    command = [sys.executable, str(ROOT / "flows" / "grpo_flow.py"), "--config-value", "config", json.dumps(changes)]
    listening: dict[str, set[str]] = {}
    talked_to: set[str] = set()
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*command, "run"], cwd=folder, env=environment | {MARK: mark}, stdout=log, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            found, remote = sockets(mark)
            for address, who in found.items():
                listening.setdefault(address, set()).update(who)
            talked_to |= remote
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
    assert process.returncode == 0, (folder / "log").read_text()[-4000:]
    yield Seen(folder=folder, ray=ray, canaries=canaries, listening=listening, talked_to=talked_to)
    shutil.rmtree(ray, ignore_errors=True)


def sockets(mark: str) -> tuple[dict[str, set[str]], set[str]]:
    """Of all processes that carry the mark: where they listen, and the addresses that they are connected to."""
    listening: dict[str, set[str]] = {}
    remote: set[str] = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) != mark:
                continue
            who = " ".join(process.cmdline())[:100]
            mine = {os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd")}
            tables = [Path(f"/proc/{process.pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
        except (psutil.Error, OSError):  # it ended meanwhile
            continue
        for line in (line.split() for table in tables for line in table.splitlines()[1:]):
            if f"socket:[{line[9]}]" not in mine:
                continue
            if line[3] == LISTENS:
                listening.setdefault(address(line[1]), set()).add(who)
            else:
                remote.add(address(line[2]))
    return listening, remote


def address(hexadecimal: str) -> str:
    """An address as /proc/net/tcp writes it, in words of four bytes of this machine's order."""
    words = bytes.fromhex(hexadecimal.partition(":")[0])
    turned = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
    if len(turned) == 4 or turned[:12] == b"\0" * 10 + b"\xff\xff":
        return ".".join(map(str, turned[-4:]))
    return ":".join(turned[i : i + 2].hex() for i in range(0, 16, 2))


LOOPBACK = re.compile(r"127\.\d+\.\d+\.\d+|0000(:0000){6}:0001")


def test_nothing_listens_or_talks_outside_loopback(seen: Seen):
    assert any("raylet" in who or "gcs_server" in who for all_who in seen.listening.values() for who in all_who)
    outside = {where: who for where, who in seen.listening.items() if not LOOPBACK.fullmatch(where)}
    assert not outside
    assert not {where for where in seen.talked_to if not LOOPBACK.fullmatch(where)} - {"0.0.0.0"}


def test_no_secret_of_the_environment_is_in_anything_that_a_run_leaves(seen: Seen):
    files = [path for root in (seen.folder, seen.ray) for path in root.rglob("*") if path.is_file()]
    assert any(".metaflow" in str(path) for path in files) and any(path.suffix == ".safetensors" for path in files)
    assert any("session_" in str(path) and path.suffix in (".log", ".out", ".err") for path in files), "Ray's logs"
    found = {
        (name, str(path))
        for path in files
        for content in contents(path.read_bytes())
        for name, canary in seen.canaries.items()
        if canary.encode() in content
    }
    assert not found


def contents(data: bytes) -> list[bytes]:
    """The bytes of a file, and what they are once unpacked: Metaflow's artifacts are gzip."""
    unpacked = [data]
    for unpack in (gzip.decompress, zlib.decompress):
        try:
            unpacked.append(unpack(data))
        except (OSError, EOFError, zlib.error):
            continue
    return unpacked


def test_the_search_finds_a_secret_in_a_packed_artifact():
    assert any(b"canary" in content for content in contents(gzip.compress(b"a canary")))
