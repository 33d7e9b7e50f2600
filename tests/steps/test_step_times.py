"""A training run says where the seconds of every step went, and how even its two ranks were."""

import json
from pathlib import Path

import pytest

from runs import TWO_RANKS, prepared, result_of, run_step, small_config

CONFIG = small_config(**TWO_RANKS, **{"optim.num_steps": 4, "warmup.num_steps": 4, "checkpoint.every_steps": 1})
FILES = {"train": "warmup", "grpo": "grpo"}
TRAINED = {"prepare", "forward", "backward", "reduce", "optimizer", "dispatch", "other", "step"}
PHASES = {"train": TRAINED | {"data_wait"}, "grpo": TRAINED | {"generate", "reward", "sync"}}


@pytest.mark.slow
@pytest.mark.parametrize("step", ["train", "grpo"])
def test_the_times_of_a_step_add_up_to_it(tmp_path: Path, step: str):
    base = prepared(tmp_path / "inputs", CONFIG)
    inputs = {"root": str(tmp_path), "model_uri": base.model_uri, "tokens_uri": base.tokens_uri}
    result_of(run_step(step, CONFIG, tmp_path, **inputs))
    rows = [json.loads(line) for line in (tmp_path / "metrics" / f"{FILES[step]}.jsonl").read_text().splitlines()]
    for row in rows:
        times = {name[5:-2]: value for name, value in row.items() if name.startswith("time/")}
        assert PHASES[step] <= set(times)
        assert ("checkpoint" in times) == (row["step"] > 0), "a commit counts to the step that waits for it"
        assert sum(times.values()) - times["step"] == pytest.approx(times["step"], rel=0.03)
        assert times["other"] < 0.2 * times["step"], "nearly all of it has a name"
        assert 1 <= row["data/imbalance"] <= 2 and 1 <= row["perf/imbalance"] <= 2
