"""The GRPO step with a constraint: trainer and reference are of the same renormalised policy as the sampler."""

import math
from pathlib import Path

import pytest

from posttrain.errors import ConfigError
from runs import metrics, prepared, result_of, run_step, small_config
from steps.plan import plan

RULE = {"rollout.environment": "small_constraints:SlateTask"}


@pytest.mark.slow
def test_a_run_samples_under_its_constraint_and_trains_the_renormalised_policy(tmp_path: Path):
    config = small_config(**RULE, **{"optim.num_steps": 3, "optim.lr": 1e-3, "method.kl_coef": 0.1})
    base = prepared(tmp_path / "inputs", config)
    inputs = {"root": str(tmp_path / "run"), "model_uri": base.model_uri, "tokens_uri": base.tokens_uri}
    result_of(run_step("grpo", config, tmp_path / "run", **inputs))
    rows = metrics(tmp_path / "run" / "metrics" / "grpo.jsonl")
    assert len(rows) == 3 and all(row["rollout/tokens_mean"] == row["rollout/tokens_max"] == 10 for row in rows)
    assert 0 < max(row["policy/mismatch_abs"] for row in rows) < 1e-5
    assert rows[0]["policy/kl"] == pytest.approx(0, abs=1e-6) and rows[-1]["policy/kl"] > 0
    assert all(0 < row["policy/entropy"] < math.log(3) for row in rows), "three tokens may follow at most"
    assert all(row["policy/grad_norm"] > 0 for row in rows)


def test_a_generator_that_takes_no_constraint_is_refused_before_the_run(tmp_path: Path):
    stub = "posttrain.compute.generator.stub:StubGenerator"
    config = small_config(**RULE, **{"rollout.generator": stub, "checkpoint.root": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"rollout\.generator: .*StubGenerator takes no argument `constraint`"):
        plan(config, flow="F", run_id="1")


def test_a_constraint_that_does_not_exist_is_refused_before_the_run(tmp_path: Path):
    lost = {"rollout.environment": "small_constraints:LostConstraint", "checkpoint.root": str(tmp_path)}
    config = small_config(**lost)
    with pytest.raises(ConfigError, match=r"its constraint: small_constraints:sonnets: .* has no 'sonnets'"):
        plan(config, flow="F", run_id="1")
