"""The GRPO step on verl's workers: the metrics and the weights of the default backend, to the bit."""

from pathlib import Path

import pytest

from posttrain.compute.verl_workers import verl_is_installed
from posttrain.errors import ConfigError
from runs import TWO_RANKS, metrics, prepared, result_of, run_step, small_config
from steps.plan import plan


@pytest.mark.skipif(not verl_is_installed(), reason="verl is not installed: make test-verl")
@pytest.mark.slow
def test_both_orchestrators_give_the_same_run(tmp_path: Path):
    base = prepared(tmp_path / "inputs", small_config(**TWO_RANKS))
    found = {}
    for name in ("ray", "verl"):
        folder = tmp_path / name
        inputs = {"root": str(folder), "model_uri": base.model_uri, "tokens_uri": base.tokens_uri}
        ran = run_step("grpo", small_config(**TWO_RANKS, **{"parallel.orchestrator": name}), folder, **inputs)
        found[name] = {
            "ledger": result_of(ran)["ledger"],
            "metrics": metrics(folder / "metrics" / "grpo.jsonl"),
            "weights": (folder / "trained_model" / "model.safetensors").read_bytes(),
        }
    assert len(found["ray"]["metrics"]) == 6
    assert found["verl"] == found["ray"]


@pytest.mark.skipif(verl_is_installed(), reason="verl is installed")
def test_a_run_on_verl_is_refused_at_the_start_where_it_is_not_installed(tmp_path: Path):
    config = small_config(**{"parallel.orchestrator": "verl", "checkpoint.root": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"parallel\.orchestrator: verl is not installed\. Fix: pip install .*verl=="):
        plan(config, flow="F", run_id="1")
