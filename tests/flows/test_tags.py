"""A run's tags: set from its labels, found by Metaflow's client, and never the end of a run."""

import json
import os
import subprocess
import sys

import pytest

from deploy import ROOT
from posttrain.config import Origin

sys.path.append(str(ROOT / "flows"))

TAGGED = """
import json, sys
sys.path.insert(0, sys.argv[1])
from metaflow import FlowSpec, step
from tags import tag_run

class TaggedFlow(FlowSpec):
    @step
    def start(self):
        tag_run({"recipe": "sft", "role": "candidate"})
        self.next(self.end)
    @step
    def end(self):
        tag_run({"recipe": "sft", "role": "champion-2"})
        tag_run({"recipe": "sft", "role": "champion-2"})

TaggedFlow()
"""
FOUND = """
import json
from metaflow import Flow, namespace
namespace(None)
flow = Flow("TaggedFlow")
found = {tag: [run.id for run in flow.runs(tag)] for tag in ("recipe:sft", "role:candidate", "role:champion-2", "mine")}
print(json.dumps([flow.latest_run.id, found, sorted(flow.latest_run.user_tags)]))
"""
NOWHERE = """
import sys
sys.path.insert(0, sys.argv[1])
from metaflow import current
from tags import tag_run
current._set_env(run_id="7", step_name="start", task_id="1")
current._flow_name = "NoFlow"
tag_run({"recipe": "sft"})
print("goes on")
"""


def python(code, home, *words):
    (home / "code.py").write_text(code)
    command = [sys.executable, str(home / "code.py"), *words]
    done = subprocess.run(command, cwd=home, env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_is_found_by_its_newest_tags_and_keeps_those_of_its_user(home):
    flow = TAGGED.replace("sys.argv[1]", repr(str(ROOT / "flows")))
    assert "WARNING" not in python(flow, home, "run", "--tag", "mine"), "the same tags again are no fault"
    run, found, tags = json.loads(python(FOUND, home))
    assert found == {"recipe:sft": [run], "role:candidate": [], "role:champion-2": [run], "mine": [run]}
    assert tags == ["mine", "recipe:sft", "role:champion-2"]


def test_metadata_that_takes_no_tag_costs_a_warning(home):
    said = python(NOWHERE, home, str(ROOT / "flows"))
    assert said.startswith("WARNING: this run has no tags: ") and said.endswith("goes on\n")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (None, "fresh"),
        ("run:SFTFlow/17", "SFTFlow/17"),
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
        ("s3://b/models/mine/", "mine"),
    ],
)
def test_a_model_is_named_shortly(path, name):
    from tags import name_of

    made = {"fresh": {"hidden_size": 32, "num_layers": 1}} if path is None else {"path": path}
    assert name_of(Origin.model_validate(made)) == name
