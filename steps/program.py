"""Run a step's function from a shell: JSON inputs in a file, JSON result on standard output."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.config import RunConfig
from posttrain.errors import PosttrainError


def main(step: Callable[..., dict[str, Any] | None]) -> None:
    """Call `step(config, **inputs)` with the file named on the command line: {"config": {...}, "root": ..., ...}."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m {step.__module__} inputs.json")
    inputs = json.loads(Path(sys.argv[1]).read_text())
    config = RunConfig.model_validate(inputs.pop("config"))
    try:
        print(json.dumps(step(config, **inputs), indent=2))
    except PosttrainError as error:
        sys.exit(f"{type(error).__name__}: {error}")
