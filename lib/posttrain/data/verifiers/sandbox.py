"""A Python program of unknown origin in a child process with limits.

What it does: CPU, memory, size of a file, open files and number of processes are limited (setrlimit); the working
folder is new and removed after; the environment is empty but for PATH; the wall deadline kills the process group; of
the output the first MiB is kept. Where Linux lets an ordinary user have namespaces (most machines do, most
containers do not), the program has no network, and its processes end with it even when they leave their group.

What it is not: a boundary against a program that attacks. It runs as this user and reads, and writes, whatever this
user may outside its folder; without namespaces it also has the network. For programs that may be hostile run posttrain
in a container or virtual machine that holds nothing else.
"""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

OUTPUT_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one run."""

    wall_s: float = 4.0
    cpu_s: int = 10
    memory_bytes: int = 2**30
    file_bytes: int = 16 * 2**20
    open_files: int = 64
    processes: int = 32


LAUNCHER = """
import ctypes, os, resource, runpy, signal, sys
limits = eval(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
USER, PID, NET, IPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
if libc and libc.unshare(USER | PID | NET | IPC) == 0:
    child = os.fork()  # the first process of the new namespace: with its end all others there end
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(0 if status == 0 else 1)
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
for name, value in (("CPU", limits["cpu_s"]), ("AS", limits["memory_bytes"]), ("FSIZE", limits["file_bytes"]),
                    ("NOFILE", limits["open_files"]), ("NPROC", limits["processes"]), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
sys.argv = ["program.py"]
runpy.run_path("program.py", run_name="__main__")
"""


def run_python(source: str, stdin: str, limits: Limits) -> str | None:
    """What a program printed; None where it failed, passed a limit, or printed too much.

    Raises:
        OSError: no process could be started.
    """
    with tempfile.TemporaryDirectory(prefix="posttrain-code-", ignore_cleanup_errors=True) as folder:
        Path(folder, "program.py").write_text(source, errors="replace")
        Path(folder, "stdin").write_text(stdin)
        with open(Path(folder, "stdin"), "rb") as given, tempfile.TemporaryFile() as printed:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", LAUNCHER, repr(asdict(limits))],
                stdin=given,
                stdout=printed,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
            try:
                status = process.wait(limits.wall_s)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _kill(process)
            size = printed.seek(0, os.SEEK_END)
            if status != 0 or size > OUTPUT_BYTES:
                return None
            printed.seek(0)
            return printed.read().decode(errors="replace")


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
