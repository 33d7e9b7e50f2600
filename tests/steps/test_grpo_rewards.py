"""A reward that fails is never a reward of zero: its group is dropped, counted, replaced, and the budget holds."""

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import EpisodeError, RewardError
from runs import prepared, small_config
from steps.grpo import grpo


def run(tmp_path: Path, function: str, **overrides: Any) -> dict[str, Any]:
    config = small_config(**{"reward.function": f"small_task:{function}", "optim.num_steps": 2, **overrides})
    base = prepared(tmp_path, config)
    result = grpo(config, root=str(tmp_path), model_uri=base.model_uri, tokens_uri=base.tokens_uri)
    assert result is not None
    return result


@pytest.mark.fault("F45", outcome="CONTINUE")
def test_one_failing_prompt_is_dropped_and_replaced(tmp_path: Path, record_property):
    # 40 prompts, 10 steps of 4: every prompt is drawn once, so exactly one group fails.
    result = run(tmp_path, "one_prompt_raises", **{"optim.num_steps": 9})
    assert result["ledger"]["dropped"] == {"reward_error": 1}
    assert result["ledger"]["trained"] == 9 * 4
    assert result["ledger"]["drawn"] == 9 * 4 + 1
    record_property("lost_groups", result["ledger"]["dropped"]["reward_error"])


@pytest.mark.slow
def test_a_failing_held_out_row_is_left_out_of_the_evaluation_only(tmp_path: Path, capsys: pytest.CaptureFixture):
    result = run(tmp_path, "one_held_out_row_raises")
    assert result["ledger"]["dropped"] == {}
    assert "dropped prompt 0: small_task:one_held_out_row_raises raised KeyError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("always_raises", "RuntimeError: the verifier is down"),
        ("not_a_number", "reward is nan, not a finite number"),
        pytest.param("hangs", r"score\(\) did not finish within 1 s", marks=pytest.mark.slow),
        pytest.param("kills_its_process", r"reward [01] died during score\(\)", marks=pytest.mark.slow),
    ],
)
@pytest.mark.fault("F45", "F46", "F47", outcome="STOP")
def test_a_reward_that_keeps_failing_stops_the_run_past_its_budget(tmp_path: Path, function: str, message: str):
    with pytest.raises(RewardError, match=rf"3 groups dropped .* reward.max_failures is 2; the last: .*{message}"):
        run(tmp_path, function, **{"reward.max_failures": 2, "reward.timeout_s": 1})


@pytest.mark.slow
@pytest.mark.fault("F48", outcome="CONTINUE")
def test_groups_without_signal_are_replaced_and_counted(tmp_path: Path, record_property):
    result = run(tmp_path, "varies_for_half_of_the_prompts", **{"method.replace_silent": True})
    ledger = result["ledger"]
    assert ledger["trained"] == 2 * 4, "every trained step is whole"
    assert ledger["dropped"]["no_signal"] > 0
    record_property("lost_groups", ledger["dropped"]["no_signal"])
    assert ledger["drawn"] == ledger["trained"] + ledger["dropped"]["no_signal"]


@pytest.mark.slow
@pytest.mark.fault("F48", outcome="STOP")
def test_a_reward_that_never_varies_stops_a_run_that_waits_for_signal(tmp_path: Path):
    with pytest.raises(
        RewardError, match=r"40 groups in a row had no different rewards: .* too easy, too hard, or the reward"
    ):
        run(tmp_path, "constant", **{"method.replace_silent": True})


@pytest.mark.slow
def test_the_cost_of_length_is_a_part_of_the_reward_in_training_only(tmp_path: Path):
    config = {"method.overlong_tokens": 4, "rollout.max_new_tokens": 4, "optim.num_steps": 1}
    (step,) = map(json.loads, Path(run(tmp_path, "constant", **config)["metrics"]).read_text().splitlines())
    assert -1 <= step["reward/overlong"] < 0
    assert step["reward/mean"] == pytest.approx(1 + step["reward/overlong"])
    assert step["eval/reward"] == 1.0


@pytest.mark.slow
@pytest.mark.fault("F46", outcome="STOP")
def test_an_environment_that_is_stuck_for_ever_stops_the_run_past_its_budget(tmp_path: Path):
    config = {"rollout.environment": "bad_environments:Stuck", "reward.timeout_s": 2, "reward.max_failures": 1}
    config = small_config(**config, **{"eval.every_steps": 100})
    base = prepared(tmp_path, config)
    with pytest.raises(EpisodeError, match=r"2 groups dropped for a failed environment, reward\.max_failures is 1"):
        grpo(config, root=str(tmp_path), model_uri=base.model_uri, tokens_uri=base.tokens_uri)


@pytest.mark.slow
def test_an_environment_trains_and_every_rollout_is_kept(tmp_path: Path):
    import pyarrow.parquet as pq

    game = "posttrain.data.guess_number"
    config = {
        "data.sources": f"{game}:demonstrations",
        "data.prompts": f"{game}:prompts",
        "data.held_out": f"{game}:held_out",
        "rollout.environment": f"{game}:GuessNumber",
        "rollout.max_new_tokens": 64,
        "reward.timeout_s": 20,
    }
    config = small_config(**config, **{"reward.function": None, "optim.num_steps": 2})
    base = prepared(tmp_path, config)
    result = grpo(config, root=str(tmp_path), model_uri=base.model_uri, tokens_uri=base.tokens_uri)
    assert result is not None and result["ledger"]["trained"] == 2 * 4
    rows = pq.read_table(result["rollouts"]).to_pylist()
    assert len([row for row in rows if row["drop_reason"] is None]) == 2 * 4 * 4
    assert any(0.0 in row["loss_mask"] for row in rows)
