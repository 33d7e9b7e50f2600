"""Retraining as a person runs it: three days of rows, and what becomes of the champion."""

import base64
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.data.sort_digits_days import add_day
from posttrain.workflow import registry
from runs import ROOT
from terminal import Terminal, clone, lines_of

ADD_DAY, RUN, SHOW = lines_of("retraining.md", "retrain_flow.py run")
SMALL = {
    "base": str(ROOT / "configs" / "retrain_tiny.yaml"),
    "model.fresh": {"hidden_size": 32, "num_layers": 2},
    "data.pack_tokens": 256,
    "optim.num_steps": 120,
    "optim.lr": 5e-3,
    "checkpoint.every_steps": 100,
    "parallel.data": 1,
}


def retrain(terminal: Terminal, fault: str | None = None) -> str:
    """Run the flow to its end, as the page says; what it said."""
    terminal.env.pop("POSTTRAIN_FAULT", None)
    terminal.env |= {"POSTTRAIN_FAULT": fault} if fault else {}
    return terminal.type(f"{RUN} --config-value config {shlex.quote(json.dumps(SMALL))}")


def champion(folder: Path) -> int:
    """Who is champion, its model whole."""
    found = registry.champion(str(folder / "registry"))
    assert found is not None
    registry.check_model(found.model_uri)
    return found.version


def found_by_tag(terminal: Terminal, *tags: str) -> list[list[str]]:
    """Ids of the runs that Metaflow's client finds by each tag."""
    code = "import json, sys; from metaflow import Flow, namespace; namespace(None); flow = Flow('RetrainFlow'); "
    code += "print(json.dumps([[run.id for run in flow.runs(tag)] for tag in sys.argv[1:]]))"
    command = [sys.executable, "-c", code, *tags]
    done = subprocess.run(command, cwd=terminal.folder, env=terminal.env, capture_output=True, check=True)
    return json.loads(done.stdout)


def promotion_cards(folder: Path) -> list[str]:
    """What the cards of the step promote show: a page holds it as JSON in base64."""
    pages = sorted(folder.rglob("mf.cards/**/*promotion*.html"), key=lambda page: page.stat().st_mtime)
    found = (re.findall(r'"([A-Za-z0-9+/=]{400,})"', page.read_text()) for page in pages)
    return ["".join(base64.b64decode(each).decode(errors="replace") for each in texts) for texts in found]


@pytest.mark.slow
def test_a_better_model_is_promoted_a_worse_one_is_not_and_a_killed_promotion_is_finished(tmp_path: Path):
    where, terminal = str(tmp_path / "registry"), clone(tmp_path)
    terminal.type(ADD_DAY)
    said = retrain(terminal)
    assert "1 new files, trained on from the config's model" in said and "promoted: the gain of" in said
    assert champion(tmp_path) == 1
    assert f"version 1 is champion: {where}/models/RetrainFlow/" in terminal.type(SHOW)

    wrong = add_day(tmp_path / "inbox", count=400, wrong=1.0)
    said = retrain(terminal)
    assert "1 new files, trained on from version 1" in said
    assert "kept: eval.gate: loss went from" in said
    assert champion(tmp_path) == 1 and registry.versions(where) == [1]
    first, second = promotion_cards(tmp_path)
    assert "Promoted as version 1" in first and "Version 1 stays champion" in second, "a failed gate has a card too"

    wrong.unlink()
    add_day(tmp_path / "inbox", count=400)  # the wrong day again, with right answers, and a third
    add_day(tmp_path / "inbox", count=400)
    said = retrain(terminal, fault="registry.after_version")
    assert "2 new files, trained on from version 1" in said
    assert said.count("Task is starting (retry)") == 1 and "promoted: the gain of" in said
    assert champion(tmp_path) == 2
    assert [entry["generation"] for entry in registry.history(where)] == [1, 2]
    roles = found_by_tag(terminal, "role:champion-1", "role:champion-2", "role:kept", "role:candidate")
    assert [len(runs) for runs in roles] == [1, 1, 1, 0]
    manifest = registry.version(where, 2)
    assert manifest["run"] == f"RetrainFlow/{roles[1][0]}"
    assert len(manifest["data"]) == 3 and len(manifest["lineage"]) == 2

    said = retrain(terminal)
    assert "nothing new: version 2 of" in said and "prepare" not in said
    assert champion(tmp_path) == 2 and len(list((tmp_path / "runs" / "RetrainFlow").iterdir())) == 3
