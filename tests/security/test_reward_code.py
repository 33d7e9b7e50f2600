"""What a model wrote and a reward runs (data/verifiers/sandbox.py): limits hold, nothing outlives it, nothing leaks.

What the sandbox is not is in SECURITY.md. Two of these need the namespaces that Linux gives an ordinary user on most
machines and in few containers; without them they are skipped, as the promise is then not made.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from posttrain.data.verifiers.sandbox import Limits, run_python

TRY = "import ctypes, os; os._exit(ctypes.CDLL(None).unshare(0x10000000 | 0x20000000 | 0x40000000 | 0x08000000) != 0)"
NAMESPACES = sys.platform == "linux" and subprocess.run([sys.executable, "-c", TRY]).returncode == 0
isolated = pytest.mark.skipif(not NAMESPACES, reason="this system gives its users no namespaces")
QUICK = Limits(wall_s=3.0)


def alive(word: str) -> list[psutil.Process]:
    """Processes whose command line holds a word."""
    found = []
    for process in psutil.process_iter():
        try:
            if word in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.parametrize(
    "program",
    [
        "x = 'x' * 10**10",
        "open('large', 'wb').write(b'x' * 2**26)",
        "files = [open('/dev/null') for _ in range(1000)]",
        "while True: pass",
        "import signal, time\nfor s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
        "while True: print('x' * 10**6)",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))",
        "import ctypes\nctypes.string_at(0)",
        "raise SystemExit(1)",
    ],
    ids=["memory", "file", "descriptors", "loop", "signals", "output", "raise a limit", "crash", "exit"],
)
def test_a_program_that_passes_a_limit_fails_in_bounded_time(program: str):
    started = time.monotonic()
    assert run_python(program, "", QUICK) is None
    assert time.monotonic() - started < QUICK.wall_s + 20


def test_secrets_of_the_run_are_in_no_variable_of_the_program(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-the-run")
    printed = run_python("import os\nprint(sorted(os.environ), os.environ)", "", QUICK)
    assert printed is not None and "canary" not in printed and "AWS" not in printed


def test_what_a_program_writes_in_its_folder_is_gone(tmp_path: Path):
    printed = run_python("import os\nopen('left', 'w').write('x')\nprint(os.getcwd())", "", QUICK)
    assert printed is not None and not Path(printed.strip()).exists()


def test_a_program_cannot_import_what_lies_beside_the_run(tmp_path: Path, monkeypatch):
    (tmp_path / "beside.py").write_text("secret = 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_python("import beside\nprint(beside.secret)", "", QUICK) is None


@isolated
def test_a_process_that_left_its_group_and_session_ends_with_the_program():
    word = f"posttrain-escaped-{os.getpid()}"
    program = (
        "import subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', '{word}'], start_new_session=True)\n"
        "print('done')"
    )
    run_python(program, "", QUICK)
    psutil.wait_procs(alive(word), timeout=10)
    assert not alive(word)


@isolated
def test_a_program_reaches_no_process_but_its_own():
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        run_python(f"import os\nos.kill(-1, 9)\nos.kill({bystander.pid}, 9)", "", QUICK)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@isolated
def test_a_program_has_no_network_not_even_loopback(s3_server):
    host, port = s3_server.removeprefix("http://").split(":")
    assert run_python(f"import socket\nsocket.create_connection(({host!r}, {port}), 2)\nprint('in')", "", QUICK) is None
