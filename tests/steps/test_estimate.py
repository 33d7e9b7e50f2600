"""A plan is computed from the config alone, and says no before a GPU does."""

import json
from pathlib import Path

import pytest
import torch

from posttrain.config import RunConfig
from posttrain.errors import ConfigError, ModelError
from posttrain.model.build import fresh_config
from posttrain.model.gpus import GPUS
from posttrain.model.memory import GIB
from runs import small_config
from steps import plan as plan_step
from steps.estimate import estimate, memory_problem

QWEN3_4B = fresh_config(
    vocab_size=151936, hidden_size=2560, num_layers=36, num_heads=32, num_kv_heads=8, mlp_size=9728, max_length=40960
) | {"head_dim": 128}


@pytest.fixture
def large(tmp_path: Path) -> RunConfig:
    """The small run on a model of 4 B parameters, of which only the shape exists."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN3_4B))
    changes = {"model.fresh": None, "model.path": str(tmp_path / "model"), "data.pack_tokens": 16_384}
    return small_config(**changes, **{"parallel.data": 1, "checkpoint.root": str(tmp_path / "runs")})


def test_a_fresh_model_fits_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = estimate(small_config(), gpu="l4")
    assert found["fits"] and not found["changes"] and found["cost"] is None
    assert not list(tmp_path.iterdir())
    assert json.loads(json.dumps(found)) == found, "plain data"


def test_time_and_cost_follow_from_flops_and_price(large: RunConfig):
    one, two = (estimate(large, gpus=1, gpu="h200", price=3.0, mfu=mfu) for mfu in (0.2, 0.4))
    assert one["stages"][0]["step_s"] == pytest.approx(2 * two["stages"][0]["step_s"])
    assert one["cost"] == pytest.approx(3.0 * one["hours"])
    assert one["hours"] == pytest.approx(sum(stage["hours"] for stage in one["stages"]))
    eight = estimate(large, gpus=8, gpu="h200", price=3.0, mfu=0.2)
    assert eight["cost"] == pytest.approx(24.0 * eight["hours"])
    assert eight["memory"]["total"] < one["memory"]["total"], "weights, gradients and moments are shared"
    assert (eight["gpus"], eight["setup"]["data"]) == (8, 8)


def test_what_does_not_fit_names_changes_that_were_computed(large: RunConfig):
    found = estimate(large, gpus=1, gpu="h100")
    assert not found["fits"] and found["memory"]["total"] > found["usable_bytes"] == GPUS["h100"].usable_bytes
    by_name = {each["change"]: each for each in found["changes"]}
    assert next(iter(by_name)) == "optim.activation_checkpointing: selective"
    assert any(each["fits"] for each in found["changes"])
    changed = large.model_copy(update={"optim": large.optim.model_copy(update={"activation_checkpointing": "full"})})
    there = estimate(changed, gpus=1, gpu="h100")["memory"]["total"]
    assert by_name["optim.activation_checkpointing: full"]["total"] == there


def test_disk_holds_one_checkpoint_more_than_are_kept(large: RunConfig):
    count = estimate(large, gpus=1)["parameters"]["total"]
    assert estimate(large, gpus=1)["disk"]["checkpoints"] == 12 * count * (large.checkpoint.keep + 1) * 2


def test_an_unknown_gpu_and_a_folder_without_a_config_are_refused(large: RunConfig, tmp_path: Path):
    with pytest.raises(ConfigError, match="gpu 'h1000' is not known; known: h100"):
        estimate(large, gpu="h1000")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        estimate(large)


def test_a_hub_id_out_of_reach_is_refused_in_words(large: RunConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = large.model.model_copy(update={"path": "nobody/nothing", "revision": "0" * 40})
    with pytest.raises(ModelError, match=r"model\.path: cannot download nobody/nothing"):
        estimate(large.model_copy(update={"model": model}))


def test_a_run_is_refused_only_beyond_the_stated_error(large: RunConfig):
    need = estimate(large)["memory"]["total"]
    assert memory_problem(large, need / 1.09) is None
    problem = memory_problem(large, need / 1.11)
    assert problem is not None
    assert "the largest part is activations" in problem and "Fix: optim.activation_checkpointing: sel" in problem


def test_the_start_step_measures_the_gpus_that_it_sees(large: RunConfig, monkeypatch: pytest.MonkeyPatch):
    """The device query alone is replaced: this machine may have no GPU."""
    on_gpu = large.model_copy(update={"parallel": large.parallel.model_copy(update={"gpus_per_node": 1})})
    assert plan_step._check_memory(large) == [], "a run on CPUs"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert plan_step._check_memory(on_gpu) == [], "the GPUs are elsewhere"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    device = type("Properties", (), {"total_memory": 24 * GIB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    with pytest.raises(ConfigError, match=r"memory: a rank would need .* GiB at .*; the largest part is"):
        plan_step.plan(on_gpu, flow="F", run_id="1")
