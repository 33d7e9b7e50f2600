"""Engines on one GPU start one after another."""

import subprocess
import sys

from posttrain.compute.generator.vllm_start import starting_alone

OTHER = """
from posttrain.compute.generator.vllm_start import starting_alone
print("asks", flush=True)
with starting_alone("cuda"):
    print("starts", flush=True)
"""


def other() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", OTHER], stdout=subprocess.PIPE, text=True)


def line(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_who_sees_the_same_gpu_waits(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with starting_alone("cuda"):
        waiting = other()
        assert line(waiting) == "asks"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        beside = other()
        assert [line(beside), line(beside)] == ["asks", "starts"]
        assert waiting.poll() is None
    assert line(waiting) == "starts"
    assert waiting.wait(10) == beside.wait(10) == 0


def test_on_a_cpu_nobody_waits():
    with starting_alone("cpu"), starting_alone("cpu"):
        pass
