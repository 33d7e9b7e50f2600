"""A process that promotes a model: `python promotions.py REGISTRY RUN PARENT MODEL`, its outcome on standard output."""

import json
import os
import subprocess
import sys
from pathlib import Path

from posttrain.workflow.registry import Candidate, promote


def start(registry: str, run: str, parent: int | None, model: str, *, fault: str) -> subprocess.Popen[str]:
    """Begin to promote, up to a fault."""
    words = [registry, run, json.dumps(parent), model]
    env = os.environ | {"POSTTRAIN_FAULT": fault}
    command = [sys.executable, str(Path(__file__)), *words]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


if __name__ == "__main__":
    registry, run, parent, model = sys.argv[1:]
    print(json.dumps(promote(registry, Candidate(run=run, parent=json.loads(parent), model_uri=model, key=run))))
