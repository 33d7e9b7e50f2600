"""A spot notice reaches a training step as a SIGTERM, through Metaflow's own monitor."""

import http.server
import os
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from deploy import ROOT

STEP = """
import os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
came = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: came.set())
from metaflow.sidecar import Sidecar
from spot import NOTICE, heeding_spot_notices
if os.environ.get("METAFLOW_RUNTIME_ENVIRONMENT") == "kubernetes":  # as @kubernetes does
    Sidecar("spot_termination_monitor").start()
with heeding_spot_notices():
    while not came.wait(0.2):
        pass
print("saving")
NOTICE.unlink()
"""


class Metadata(http.server.BaseHTTPRequestHandler):
    """The two answers of EC2's metadata service that a spot instance under notice gets."""

    def do_PUT(self):
        self.answer(b"token")

    def do_GET(self):
        self.answer(b"spot" if self.path.endswith("instance-life-cycle") else b"2030-01-01T00:00:00Z")

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def metadata_service():
    """Yields the address of a proxy that answers for 169.254.169.254, whatever is asked."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("place", ["kubernetes", "aws-batch"])
@pytest.mark.fault("F3", outcome="RESUME")
def test_a_spot_notice_is_a_sigterm_to_the_step(home, place):
    with metadata_service() as address:
        env = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
        env |= {"http_proxy": address, "METAFLOW_RUNTIME_ENVIRONMENT": place, "MF_PATHSPEC": "F/1/train/2"}
        command = [sys.executable, "-c", STEP, str(ROOT / "flows")]
        done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "saving\n", done.stderr
    assert "about to be taken away" in done.stderr


def test_two_notices_are_one_sigterm():
    code = """
import signal, threading
from posttrain.notice import stop_once
came = []
signal.signal(signal.SIGTERM, lambda *_: came.append(signal.signal(signal.SIGTERM, signal.SIG_DFL)))
for where in ("this machine", "another node"):
    stop_once(f"{where} is about to be taken away")
print(len(came))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "1\n"), "a second one would have ended it before it had saved"
    assert done.stderr == "this machine is about to be taken away\n"
