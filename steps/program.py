"""Run a step's function from a shell: JSON inputs in a file, JSON result on standard output."""

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain import collector
from posttrain.config_file import load_config
from posttrain.errors import PosttrainError, PreemptedError
from posttrain.workflow.stopping import EXIT_CODE


def main(step: Callable[..., dict[str, Any] | None]) -> None:
    """Call `step(config, **inputs)` with the file named on the command line: {"config": {...}, "root": ..., ...}."""
    collector.calm()
    name = step.__name__
    needed = [p.name for p in inspect.signature(step).parameters.values() if p.default is p.empty]
    usage = f"usage: python -m steps.{name} inputs.json, a JSON object with {', '.join(needed)}"
    if len(sys.argv) != 2:
        sys.exit(usage)
    try:
        inputs = json.loads(Path(sys.argv[1]).read_text())
    except (OSError, json.JSONDecodeError) as error:
        sys.exit(f"{sys.argv[1]}: {error}\n{usage}")
    missing = [key for key in needed if key not in inputs]
    if missing:
        sys.exit(f"{sys.argv[1]}: no {', '.join(missing)}\n{usage}")
    try:
        config = load_config(json.dumps(inputs.pop("config")))
        print(json.dumps(step(config, **inputs), indent=2))
    except PreemptedError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except PosttrainError as error:
        sys.exit(f"{type(error).__name__}: {error}")
