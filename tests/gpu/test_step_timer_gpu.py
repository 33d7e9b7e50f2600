"""On a GPU the marks are the device's: what is queued is charged to its name, and nothing waits but the step."""

import time

import pytest
import torch

from posttrain.compute.step_timer import StepTimer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def busy(x: torch.Tensor, times: int) -> torch.Tensor:
    for _ in range(times):
        x = torch.nn.functional.normalize(x @ x)
    return x


def test_queued_work_is_charged_to_its_name_and_all_adds_up():
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    busy(x, 3).sum().item()
    left_by_the_last_step = busy(x, 40)
    started = time.perf_counter()
    timer = StepTimer(device)
    y = busy(x, 20)
    timer.mark("forward")
    y = busy(y, 40)
    timer.mark("backward")
    queued = time.perf_counter() - started
    y.sum().item()
    timer.synced()
    took = time.perf_counter() - started
    found = timer.metrics()
    assert queued < 0.5 * took, "a mark waited for the device"
    assert 1.5 < found["time/backward_s"] / found["time/forward_s"] < 2.5
    assert found["time/optimizer_s"] > found["time/forward_s"], "the wait for the step before is its optimizer's"
    assert sum(found.values()) == pytest.approx(took, rel=0.05)
    assert torch.isfinite(left_by_the_last_step).all()
