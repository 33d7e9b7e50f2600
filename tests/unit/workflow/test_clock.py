"""The phases of a step and what no phase accounts for are the step."""

import time

import pytest

from posttrain.workflow.clock import Clock


def test_all_times_add_up_to_the_step():
    clock = Clock()
    for name in ("generate", "reward", "generate"):
        with clock.phase(name):
            time.sleep(0.02)
    time.sleep(0.05)
    found = clock.metrics({"loss": 3.0, "time/forward_s": 0.01, "time/backward_s": 0.02})
    assert found["time/generate_s"] > found["time/reward_s"] >= 0.02
    assert found["time/other_s"] >= 0.02 - 0.001
    parts = sum(value for name, value in found.items() if name != "time/step_s") + 0.03
    assert parts == pytest.approx(found["time/step_s"], rel=1e-6)
