"""A generator with the wrong weights stops the run; one that hangs ends it at the deadline."""

from pathlib import Path

import pytest

from posttrain.errors import ComputeError, SyncError
from runs import prepared, small_config
from steps.grpo import grpo


def run(tmp_path: Path, generator: str, **overrides) -> None:
    config = small_config(**{"rollout.generator": f"actors:{generator}", **overrides})
    base = prepared(tmp_path, config)
    grpo(config, root=str(tmp_path), model_uri=base.model_uri, tokens_uri=base.tokens_uri)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
@pytest.mark.fault("F7", outcome="STOP")
def test_stale_weights_stop_the_run(tmp_path: Path, lora):
    with pytest.raises(SyncError, match=r"generator 0 holds \w+ after the sync to version 1, the policy sent \w+"):
        run(tmp_path, "ForgetfulGenerator", **{"model.lora": lora})


@pytest.mark.fault("F7", outcome="STOP")
def test_a_hanging_generator_is_named_at_the_deadline(tmp_path: Path):
    message = r"(?s)generator 0: generate\(\) did not finish within 20 s.*1 generators died or hung.*max_failures is 0"
    with pytest.raises(ComputeError, match=message):
        run(tmp_path, "HangingGenerator", **{"rollout.timeout_s": 20, "rollout.max_failures": 0})
