"""RL methods with an advantage a token, as whole runs: what they measure, and that they resume to the same bytes."""

from pathlib import Path

import pytest

from runs import TWO_RANKS, Prepared, metrics, prepared, result_of, run_step, small_config

PPO = TWO_RANKS | {
    "method.advantage": "gae",
    "method.loss": "clipped",
    "method.epochs": 2,
    "method.group_size": 1,
    "method.kl_coef": 0.05,
    "method.kl_in": "reward",
    "method.kl_estimator": "k1",
    "rollout.prompts_per_step": 16,
    "optim.num_steps": 4,
    "optim.lr": 1e-3,
}


def grpo(config, base: Prepared, folder: Path, *, fault: str | None = None):
    inputs = {"root": str(folder), "model_uri": base.model_uri, "tokens_uri": base.tokens_uri}
    return run_step("grpo", config, folder, fault=fault, teacher_uri=base.teacher_uri, **inputs)


@pytest.mark.slow
def test_ppo_trains_its_critic_and_resumes_to_the_same_bytes(tmp_path: Path):
    config = small_config(**PPO)
    base = prepared(tmp_path, config)
    whole = result_of(grpo(config, base, tmp_path))
    rows = metrics(tmp_path / "metrics" / "grpo.jsonl")
    assert all(row["policy/kl"] == pytest.approx(0, abs=0.05) for row in rows), "the reference's columns are in order"
    assert rows[0]["value/explained_variance"] == 0 and rows[-1]["value/loss"] < rows[0]["value/loss"]
    assert grpo(config, base, tmp_path / "killed", fault="engine.before_update.0@6").returncode != 0  # in a second pass
    again = result_of(grpo(config, base, tmp_path / "killed"))
    assert again["ledger"] == whole["ledger"]
    assert metrics(tmp_path / "killed" / "metrics" / "grpo.jsonl") == rows
    weights = [Path(each["model_uri"], "model.safetensors").read_bytes() for each in (whole, again)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_teacher_that_is_the_policy_has_nothing_to_teach_at_first(tmp_path: Path):
    start = prepared(tmp_path / "start", small_config())
    changes = {"model.fresh": None, "model.path": start.model_uri, "method.teacher": start.model_uri}
    config = small_config(**changes, **{"method.advantage": "teacher", "method.group_size": 1, "warmup": None})
    base = prepared(tmp_path, config)
    result_of(grpo(config, base, tmp_path))
    rows = metrics(tmp_path / "metrics" / "grpo.jsonl")
    assert rows[0]["policy/teacher_kl"] == pytest.approx(0, abs=1e-5) and abs(rows[0]["loss"]) < 1e-5
    assert rows[0]["policy/mismatch_abs"] < 1e-5, "and the packs' columns are in order"


@pytest.mark.slow
@pytest.mark.fault("F44", outcome="CONTINUE")
def test_a_run_whose_policy_runs_away_says_so_once_and_goes_on(tmp_path: Path):
    config = small_config(**{"method.kl_coef": 0.0, "optim.lr": 0.3, "optim.num_steps": 12, "warmup": None})
    base = prepared(tmp_path, config)
    ended = grpo(config, base, tmp_path)
    result_of(ended)
    rows = metrics(tmp_path / "metrics" / "grpo.jsonl")
    assert rows[-1]["policy/kl"] > 2 and rows[-1]["watch/steps"] > 0
    told = [line for line in ended.stdout.splitlines() if "grpo: WARNING: step" in line and "policy/kl is" in line]
    assert len(told) == 1 and "above 2: the policy is far from its reference. Fix: " in told[0]
