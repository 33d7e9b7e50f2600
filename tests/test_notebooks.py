"""The notebooks run as they stand, on runs that tests make; inspect_run.ipynb in tests/flows/test_grpo_flow.py."""

import os

import nbformat
import pytest
from nbclient import NotebookClient

from posttrain import storage
from runs import ROOT, prepared, recipe_config


def executed(name, monkeypatch, folder):
    """What the cells of a notebook print and show, joined."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT / "lib", ROOT, ROOT / "tests"))))
    notebook = nbformat.read(ROOT / "notebooks" / name, 4)
    assert not [out for cell in notebook.cells for out in cell.get("outputs", [])], "commit notebooks without outputs"
    NotebookClient(notebook, timeout=300).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    shown = []
    for out in outputs:
        data = out.get("data", {})
        shown.append(out.get("text") or data.get("text/markdown") or data["text/plain"])
    return "\n".join(shown)


def test_write_a_reward_shows_parts_signal_and_failure(monkeypatch, tmp_path):
    shown = executed("write_a_reward.ipynb", monkeypatch, tmp_path)
    assert "1.50  {'places': 1.0, 'exact': 0.5}" in shown, "the right answer"
    table = [line.split(" | ") for line in shown.splitlines() if line.startswith("| ") and "advantage" not in line]
    assert len(table) == 3 and {row[2] for row in table} == {"0.00"}, "all wrong: the exact check has no signal"
    assert len({row[4] for row in table}) > 1, "right digits has one"
    assert "__main__:fragile raised ValueError" in shown and "asked 'sort" in shown


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A run that learns nothing and one that learns, on the same rows, each with its export."""
    from steps.export_checkpoint import export_checkpoint
    from steps.train import train

    roots = []
    for name, lr in (("a", 0.0), ("b", 1e-2)):
        root = tmp_path_factory.mktemp(name)
        changes = {"data.held_out": "posttrain.data.sort_digits:held_out_demonstrations", "optim.lr": lr}
        config = recipe_config("sft", **changes, **{"optim.num_steps": 20, "checkpoint.every_steps": 20})
        base = prepared(root, config)
        uris = {"root": str(root), "model_uri": base.model_uri, "tokens_uri": base.tokens_uri}
        train(config, **uris, teacher_uri=None, recipe=True)
        (checkpoint,) = storage.list_folders(str(root / "checkpoints" / "sft"))[-1:]
        export_checkpoint(str(root / "checkpoints" / "sft" / checkpoint), str(root / "export"))
        roots.append(str(root))
    return roots


@pytest.mark.slow
def test_compare_runs_says_what_differs_and_which_is_better(monkeypatch, tmp_path, two_runs):
    monkeypatch.setenv("RUN_A", two_runs[0])
    monkeypatch.setenv("RUN_B", two_runs[1])
    shown = executed("compare_runs.ipynb", monkeypatch, tmp_path)
    assert "| optim.lr | 0.0 | 0.01 |" in shown and "| seed |" not in shown
    assert "the same batches" in shown and "Training loss" in shown
    assert "B is better" in shown
