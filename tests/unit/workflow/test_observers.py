"""Progress as lines with an ETA, and metrics that a resume does not write twice."""

import json
from pathlib import Path

from posttrain.workflow.observers import MetricsFile, Observers, Terminal


def test_metrics_file_drops_the_steps_that_a_resume_repeats(tmp_path: Path):
    path = tmp_path / "metrics" / "m.jsonl"
    first = MetricsFile(str(path))
    first.restore([])
    for step in range(3):
        first.step({"step": step, "loss": 1.0 / (step + 1)})
    second = MetricsFile(str(path))
    second.restore([json.loads(line) for line in path.read_text().splitlines()[:2]])
    second.step({"step": 2, "loss": 0.25})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "loss": 1.0},
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25},
    ]


def test_terminal_prints_progress_with_an_eta(capsys):
    terminal = Terminal("grpo", 10, ["reward/mean", "eval/reward"])
    terminal.restore([{"step": s} for s in range(8)])
    terminal.step({"step": 8, "reward/mean": 0.5})
    terminal.step({"step": 9, "reward/mean": 0.5, "eval/reward": 0.75})
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "grpo: continuing after step 8 of 10"
    assert out[1].startswith("grpo  9/10  reward/mean 0.500") and "ETA" in out[1] and "eval" not in out[1]
    assert "eval/reward 0.750" in out[2] and out[2].endswith("ETA 0:00")


def test_terminal_can_be_sparse_and_never_skips_the_end(capsys):
    terminal = Terminal("warmup", 7, ["loss"], every=3)
    for step in range(7):
        terminal.step({"step": step, "loss": 1.0})
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["3/7", "6/7", "7/7"]


def test_observers_keep_the_history_that_checkpoints_hold():
    seen = Observers([])
    seen.restore([{"step": 0}])
    seen.step({"step": 1})
    assert seen.history == [{"step": 0}, {"step": 1}]
