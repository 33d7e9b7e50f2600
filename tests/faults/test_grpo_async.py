"""Generators that work ahead of training: nothing is too old, and after a kill every prompt is still trained once."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from posttrain.workflow.ledger_file import read_ledger
from runs import TWO_RANKS, Prepared, metrics, prepared, result_of, run_step, small_config, steps_again, steps_done
from steps.audit import audit

STEPS, STALENESS = 9, 2
CONFIG = small_config(
    **TWO_RANKS,
    **{
        "optim.num_steps": STEPS,
        "rollout.max_staleness": STALENESS,
        "reward.function": "small_task:one_prompt_raises",
    },
)
"""40 prompts, 9 steps of 4: every prompt is drawn once at most, and one of the first 37 fails for good."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("inputs"), CONFIG)


def grpo(base: Prepared, folder: Path, *, fault: str | None = None, config=CONFIG):
    inputs = {"root": str(folder), "model_uri": base.model_uri, "tokens_uri": base.tokens_uri}
    (folder / "config.json").write_text(config.model_dump_json())
    return run_step("grpo", config, folder, fault=fault, **inputs)


def check(folder: Path, result: dict[str, Any]) -> list[dict[str, float]]:
    """Every draw up to the last trained once or counted as dropped, in order, and none too old; the metrics."""
    rows = read_ledger(f"{folder}/ledger/grpo.jsonl")
    trained = [[n for first, last in row["draws"] for n in range(first, last + 1)] for row in rows]
    in_order = [uid for step in trained for uid in step]
    assert [len(step) for step in trained] == [4] * STEPS
    assert len(set(in_order)) == 4 * STEPS and in_order == sorted(in_order) and in_order[-1] == 4 * STEPS
    ledger = result["ledger"]
    assert (ledger["drawn"], ledger["trained"], ledger["dropped"]) == (4 * STEPS + 1, 4 * STEPS, {"reward_error": 1})
    assert ledger["open"] == {}
    assert audit(str(folder), replay=False)["stages"]["grpo"]["draws"] == 4 * STEPS
    seen = metrics(folder / "metrics" / "grpo.jsonl")
    assert max(row["rollout/staleness_max"] for row in seen) <= STALENESS
    return seen


def test_generators_work_ahead_within_the_bound_and_evaluations_name_their_version(base: Prepared, tmp_path: Path):
    seen = check(tmp_path, result_of(grpo(base, tmp_path)))
    assert max(row["rollout/staleness_max"] for row in seen) > 0, "something was sampled ahead"
    assert {row["step"]: row["eval/version"] for row in seen if "eval/version" in row} == {0: 0, 3: 3, 6: 6, 8: 9}


PLACES = [
    *(f"controller.before_train@{step}" for step in range(2, STEPS + 1)),
    *(f"policy.train_step.{rank}@{step}" for rank in (0, 1) for step in range(2, STEPS + 1)),
    *(f"checkpoint.{phase}@{save}" for phase in ("before_manifest", "after_commit") for save in (1, 2, 3)),
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", random.Random(20261129).sample(PLACES, 2))
@pytest.mark.fault("F50", outcome="RESUME")
def test_a_kill_at_a_random_place_loses_no_prompt_and_repeats_none(
    base: Prepared, tmp_path: Path, fault: str, record_property
):
    assert grpo(base, tmp_path, fault=fault).returncode != 0
    done = steps_done(tmp_path, "grpo")
    resumed = grpo(base, tmp_path)
    check(tmp_path, result_of(resumed))
    record_property("lost_steps", steps_again(done, resumed))


@pytest.mark.slow
@pytest.mark.fault("F50", outcome="RESUME")
def test_a_checkpoint_says_how_far_the_prompts_under_way_were(base: Prepared, tmp_path: Path):
    assert grpo(base, tmp_path, fault="controller.before_train@6").returncode == -9
    folder = tmp_path / "checkpoints" / "grpo" / "step_000004"
    ledger = json.loads((folder / "state.json").read_text())["ledger"]
    under_way = [uid for uids in ledger["open"].values() for uid in uids]
    assert 0 < len(under_way) <= STALENESS * 4
    assert ledger["drawn"] == ledger["trained"] + sum(ledger["dropped"].values()) + len(under_way)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 2}])
@pytest.mark.fault("F6", outcome="CONTINUE")
def test_a_generator_killed_in_a_call_is_replaced_and_synchronous_training_has_the_same_bits(tmp_path: Path, lora):
    """With adapters, the new one gets what the others were sent once."""
    found = {}
    base = prepared(tmp_path, small_config())
    for name in ("transformers", "actors:DyingTransformers"):
        config = small_config(**{"rollout.generator": name, "optim.num_steps": 3, "model.lora": lora})
        folder = tmp_path / name.partition(":")[0]
        folder.mkdir()
        done = grpo(base, folder, config=config)
        weights = (folder / "trained_model" / "model.safetensors").read_bytes()
        found[name] = (result_of(done)["ledger"], metrics(folder / "metrics" / "grpo.jsonl"), weights)
        assert ("generator 0 died and is replaced" in done.stdout) == (name != "transformers")
    assert found["transformers"] == found["actors:DyingTransformers"]
