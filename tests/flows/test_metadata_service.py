"""A run on a real metadata service with PostgreSQL, where POSTTRAIN_METADATA_SERVICE has the address of one.

No registry has the service, so no lane of CI does: docs/operations.md says how to bring one up.
"""

import json
import os
import subprocess
import sys
from uuid import uuid4

import pytest

from runs import ROOT, SMALL_RECIPE, SMALL_ROWS

SERVICE = os.environ.get("POSTTRAIN_METADATA_SERVICE")
LOOK = """
import json, sys
from metaflow import Flow, namespace
namespace(None)
(run,) = Flow("SFTFlow").runs("mine:" + sys.argv[1])
found = [each.id for each in Flow("SFTFlow").runs(f"data:{run.data.labels['data']}")]
from metaflow.cards import get_cards
cards = {step.id: len(get_cards(step.task)) for step in run}
run.add_tag("looked-at")
print(json.dumps({
    "id": run.id, "found": found, "labels": run.data.labels, "tags": sorted(run.user_tags), "cards": cards,
    "ended": run.successful, "later": [each.id for each in Flow("SFTFlow").runs("looked-at")],
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(SERVICE is None, reason="POSTTRAIN_METADATA_SERVICE names no metadata service")
def test_a_run_is_found_by_its_tags_on_a_metadata_service(home):
    base = {"base": str(ROOT / "configs" / "sft_tiny.yaml"), "eval.prompts": None, "reward": None}
    config = json.dumps(base | SMALL_RECIPE | SMALL_ROWS["sft"])
    env = os.environ | {"METAFLOW_DEFAULT_METADATA": "service", "METAFLOW_SERVICE_URL": SERVICE}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    env["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))
    flow = [sys.executable, str(ROOT / "flows" / "sft_flow.py"), "--config-value", "config", config]
    mine = uuid4().hex  # the service remembers the runs of earlier tests
    command = [*flow, "run", "--tag", f"mine:{mine}"]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    look = [sys.executable, "-c", LOOK, mine]
    seen = subprocess.run(look, cwd=home, env=env, capture_output=True, text=True, timeout=120)
    assert seen.returncode == 0, seen.stderr
    found = json.loads(seen.stdout)
    assert found["ended"] and found["later"] == [found["id"]] and found["id"] in found["found"]
    wanted = {f"{name}:{value}" for name, value in found["labels"].items()} | {f"mine:{mine}"}
    assert wanted <= set(found["tags"]) and set(found["labels"]) == {"recipe", "model", "data"}
    shown = {step for step, count in found["cards"].items() if count}
    assert shown == {"merge_tokens", "warmup", "train", "evaluate", "export"}
