"""The GRPO step with vLLM as its generator: it trains on what it sampled, and stops when the generator fails."""

from pathlib import Path

import pytest

from posttrain.compute.generator.vllm import vllm_is_installed
from posttrain.errors import ConfigError
from runs import Prepared, metrics, prepared, result_of, run_step, small_config
from steps.plan import plan

with_vllm = pytest.mark.skipif(not vllm_is_installed(), reason="vllm is not installed: make test-vllm")
CHANGES = {
    "rollout.generator": "vllm",
    "model.fresh": {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2},  # heads of 32
    "optim.num_steps": 3,
    "parallel.data": 1,
    "rollout.max_failures": 0,
}
LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("inputs"), small_config(**CHANGES))


def run(base: Prepared, folder: Path, *, fault: str | None = None, **changes):
    inputs = {"root": str(folder), "model_uri": base.model_uri, "tokens_uri": base.tokens_uri}
    return run_step("grpo", small_config(**CHANGES | changes), folder, fault=fault, **inputs)


@with_vllm
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_it_trains_on_what_vllm_sampled(base: Prepared, tmp_path: Path, max_staleness: int):
    result = result_of(run(base, tmp_path, **{"rollout.max_staleness": max_staleness}))
    assert result["ledger"]["trained"] == 3 * 4
    rows = metrics(tmp_path / "metrics" / "grpo.jsonl")
    assert len(rows) == 3
    mismatch = [row["policy/mismatch_abs"] for row in rows]
    if max_staleness == 0:
        assert 0 < max(mismatch) < 1e-5, "two engines, one model, in float32"
    else:
        assert mismatch[0] < 1e-5 < max(mismatch), "later batches were sampled by older weights, in part"
    assert all(row["policy/grad_norm"] > 0 for row in rows)


@with_vllm
def test_it_trains_adapters_which_are_all_that_is_sent_after_the_first_sync(
    base: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NOTED", str(tmp_path / "sent"))
    changes = {"rollout.generator": "vllm_actors:NotingVllm", "model.lora": LORA, "optim.lr": 0.01}
    result_of(run(base, tmp_path, **changes))
    rows = metrics(tmp_path / "metrics" / "grpo.jsonl")
    assert 0 < max(row["policy/mismatch_abs"] for row in rows) < 1e-5
    assert all(row["policy/grad_norm"] > 0 for row in rows)
    first, *later = [list(map(int, line.split())) for line in (tmp_path / "sent").read_text().splitlines()]
    assert first[0] > 2 * 14 and later == [[2 * 14, later[0][1]]] * 3
    assert later[0][1] < first[1] / 10


@with_vllm
@pytest.mark.parametrize("lora", [None, LORA])
def test_stale_weights_stop_the_run(base: Prepared, tmp_path: Path, lora):
    ended = run(base, tmp_path, **{"rollout.generator": "vllm_actors:ForgetfulVllm", "model.lora": lora})
    assert ended.returncode != 0
    assert "SyncError: generator 0 holds" in ended.stderr and "after the sync to version 1" in ended.stderr


@with_vllm
def test_a_killed_engine_is_named(base: Prepared, tmp_path: Path):
    ended = run(base, tmp_path, fault="vllm.step@20")
    assert ended.returncode != 0
    assert "WorkerDiedError: generator 0 died during generate()" in ended.stderr


@pytest.mark.skipif(vllm_is_installed(), reason="vllm is installed")
def test_a_run_on_vllm_is_refused_at_the_start_where_it_is_not_installed(tmp_path: Path):
    config = small_config(**CHANGES, **{"checkpoint.root": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"rollout\.generator: vllm is not installed\. Fix: pip install"):
        plan(config, flow="F", run_id="1")
