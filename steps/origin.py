"""Chains of runs: what `run:SFTFlow/ID` names, and the lineage that travels with every exported folder."""

import json
from pathlib import Path
from typing import Any

from posttrain import storage
from posttrain.config import RunConfig

RUN = "run:"
LINEAGE = "lineage.json"
"""In an exported folder: a list of its runs, the first one first. It is copied with the model, so the next run, which
starts from the folder, finds it and adds itself."""


def locate(path: str, config: RunConfig) -> str:
    """The folder that a path of the config names: of an earlier run its export, below this run's checkpoint.root."""
    if not path.startswith(RUN):
        return path
    root = config.checkpoint.root or "runs"
    root = root if storage.is_s3(root) else str(Path(root).expanduser().resolve())
    return storage.join(root, *path.removeprefix(RUN).strip("/").split("/"), "export")


def read_lineage(folder: Path) -> list[dict[str, Any]]:
    """The runs that made a model, the first one first; none for a model from elsewhere."""
    path = folder / LINEAGE
    return json.loads(path.read_text()) if path.is_file() else []


def lineage_table(runs: list[dict[str, Any]]) -> str:
    """Markdown of a lineage, for the model card."""
    columns = ("run", "method", "started_from", "config_sha256", "data_sha256", "tokenizer_sha256", "ledger")
    rows = [f"| {' | '.join(str(run.get(c) or '')[:40] for c in columns)} |" for run in runs]
    return "\n".join([f"| {' | '.join(columns)} |", f"|---{'|---' * (len(columns) - 1)}|", *rows])
