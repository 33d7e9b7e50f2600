"""These tests run a real vLLM on this machine: `make test-vllm` has one, and elsewhere they are skipped."""

import os

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: make test-vllm")
os.environ.setdefault("OMP_NUM_THREADS", "1")
