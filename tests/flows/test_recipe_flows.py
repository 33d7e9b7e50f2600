"""The flows of the recipes on rows, as a person runs them: small, from any folder, to an export that opens."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from runs import ROOT, SMALL_RECIPE, SMALL_ROWS
from terminal import Terminal, clone, lines_of

SHOWN = {
    "sft": ["loss, nats per token or pair", "reward, greedy", "solved by one of 4 samples", "By slice"],
    "dpo": ["chosen answer likelier", "margin of the chosen", "By slice"],
    "reward": ["accuracy against the labels", "By slice", "By the margin of the pair", "How sure and how right: after"],
    "distill": ["divergence from the teacher", "reward, greedy", "By slice"],
}
SLICED = {name: f"small_task:sliced_{'sft' if name == 'distill' else name}" for name in SHOWN}


def overrides(name: str) -> dict[str, object]:
    asked = {} if name == "reward" else {"eval.prompts": "small_task:held_out", "reward.function": "small_task:reward"}
    return {"base": str(ROOT / "configs" / f"{name}_tiny.yaml"), **SMALL_RECIPE, **SMALL_ROWS[name], **asked}


def run(terminal: Terminal, line: str, name: str, *, before: Sequence[str] = (), **more: object) -> str:
    """Type the line that runs a recipe from its file, and look at what it says and makes; its run id.

    Args:
        before: the recipes that its model has gone through.
    """
    changes = overrides(name) | more | {"data.held_out": SLICED[name], "eval.slice_by": "slice"}
    (terminal.folder / f"{name}.yaml").write_text(json.dumps(changes))
    said = terminal.type(f"{line} --run-id-file run_id")
    assert f"{name} 6/6" in said and "exported model: " in said
    assert all(label in said for label in SHOWN[name])
    run_id = (terminal.folder / "run_id").read_text()
    (export,) = (terminal.folder / "runs").glob(f"*/{run_id}/export")
    entries = json.loads((export / "lineage.json").read_text())
    assert [entry["method"] for entry in entries] == [*before, name] and len(entries[-1]["ledger"]) == 64
    card = (export / "README.md").read_text()
    assert "### By slice" in card and "license: unknown" in card and "small_task:" in card
    return run_id


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [("reward", {}), ("distill", {"method.top_k": 8})],  # its teacher writes first: a step that does nothing otherwise
    ids=["reward", "distill offline"],
)
def test_a_recipe_runs_from_its_config_to_its_export(tmp_path: Path, name: str, more: dict[str, object]):
    run(clone(tmp_path), f"python flows/{name}_flow.py run --config {name}.yaml", name, **more)


@pytest.mark.slow
def test_the_chain_of_the_page_leads_from_demonstrations_to_preferences(tmp_path: Path):
    terminal = clone(tmp_path)
    first, second = lines_of("recipes.md", "run:SFTFlow/RUN_ID")
    made = run(terminal, first, "sft")
    run(terminal, second.replace("RUN_ID", made), "dpo", before=["sft"])


@pytest.mark.slow
def test_a_gate_ends_the_run_before_its_export(tmp_path: Path):
    rate = {"optim.lr": 1.0}  # so large that six steps do harm
    sliced = {"data.held_out": SLICED["sft"], "eval.slice_by": "slice"}
    gate = {"eval.gate": {"loss": 0, "loss[slice=long]": 0, "loss[slice=short]": 1e9}}
    changes = overrides("sft") | {"eval.prompts": None, "reward": None} | sliced | gate | rate
    (tmp_path / "sft.yaml").write_text(json.dumps(changes))
    said = clone(tmp_path).type("python flows/sft_flow.py run --config sft.yaml", status=1)
    assert "GateError: eval.gate: loss went from" in said
    assert "; loss[slice=long] went from" in said and "loss[slice=short] went" not in said
    assert not list((tmp_path / "runs").glob("*/*/export"))
