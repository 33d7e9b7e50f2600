"""Trackers for TensorBoard, MLflow and Weights & Biases. Each imports its package when it starts.

A repeated step is bitwise the one before it but for its clocks. TensorBoard overwrites it;
the other two cannot, so they say which step they have last and get only later ones.
"""

import html
import importlib.util
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain import storage
from posttrain.errors import ConfigError
from posttrain.plugin import resolve
from posttrain.workflow.tracking import RunFacts, Status, Tracker

EXPERIMENT = "posttrain"
"""The MLflow experiment, unless MLFLOW_EXPERIMENT_NAME says another."""
UPLOAD_EVERY_S = 10.0
"""Event files in S3 are written whole, seconds."""
PARAM_CHARS = 500
"""Longest value of an MLflow parameter that every server takes."""


class TensorBoard:
    """Event files in <folder>/tensorboard/<run id>; where that is S3, uploaded now and then and at the end."""

    def start(self, facts: RunFacts) -> int:
        from torch.utils.tensorboard import SummaryWriter

        self.uri = storage.join(facts.folder, "tensorboard", facts.run_id)
        self.local = Path(tempfile.mkdtemp(prefix="tensorboard-") if storage.is_s3(self.uri) else self.uri)
        self.uploaded = time.monotonic()
        # What an earlier attempt wrote of the steps that come again is void.
        self.writer = SummaryWriter(str(self.local), purge_step=facts.first_step)
        if not facts.first_step:
            self.writer.add_text("config", "\n".join(f"    {k}: {v}" for k, v in flat(facts.config).items()), 0)
        return facts.first_step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self._deliver()

    def text(self, step: int, name: str, text: str) -> None:
        self.writer.add_text(name, text, step)
        self._deliver()

    def finish(self, status: Status) -> None:
        self.writer.close()
        self._upload()

    def _deliver(self) -> None:
        self.writer.flush()
        if time.monotonic() - self.uploaded > UPLOAD_EVERY_S:
            self._upload()

    def _upload(self) -> None:
        if storage.is_s3(self.uri):
            for file in self.local.iterdir():
                storage.write_bytes(storage.join(self.uri, file.name), file.read_bytes())
        self.uploaded = time.monotonic()


class MLflow:
    """A run of the server's experiment; MLflow's own environment variables hold its credentials.

    Args:
        uri: of the tracking server, or of a database (sqlite:///runs.db).
    """

    def __init__(self, uri: str):
        self.uri = uri

    def start(self, facts: RunFacts) -> int:
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        self.client = MlflowClient(tracking_uri=self.uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(name)
        found = self.client.search_runs([experiment_id], f"tags.`posttrain.run_id` = '{facts.run_id}'", max_results=1)
        if found:
            self.run = found[0].info.run_id
            self.client.update_run(self.run, status="RUNNING")
            return int(found[0].data.metrics.get("step", -1)) + 1
        tags = {"posttrain.run_id": facts.run_id, "posttrain.folder": facts.folder}
        self.run = self.client.create_run(experiment_id, run_name=facts.name, tags=tags).info.run_id
        params = [Param(key, str(value)[:PARAM_CHARS]) for key, value in flat(facts.config).items()]
        for at in range(0, len(params), 100):  # the most that a request may hold
            self.client.log_batch(self.run, params=params[at : at + 100])
        return 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(time.time() * 1000)
        # "step" comes with the others, in one request: it says later what is there.
        points = [Metric(name, value, now, step) for name, value in {**metrics, "step": float(step)}.items()]
        self.client.log_batch(self.run, metrics=points)

    def text(self, step: int, name: str, text: str) -> None:
        self.client.log_text(self.run, text, f"{name}/step_{step:06d}.md")

    def finish(self, status: Status) -> None:
        self.client.set_terminated(self.run, "FINISHED" if status == "finished" else "FAILED")


class WandB:
    """A Weights & Biases run; WANDB_API_KEY, WANDB_ENTITY and WANDB_MODE=offline come from the environment.

    Offline, every attempt writes a folder with the whole history: sync the newest.
    """

    def __init__(self, project: str):
        self.project = project

    def start(self, facts: RunFacts) -> int:
        import wandb  # pyright: ignore[reportMissingImports]

        folder = tempfile.mkdtemp(prefix="wandb-") if storage.is_s3(facts.folder) else facts.folder
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=self.project,
            id=facts.run_id,
            name=facts.name,
            resume="allow",
            config=flat(facts.config),
            dir=folder,
            settings=wandb.Settings(console="off", quiet=True),
        )
        return self.run.step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)  # sent when a later step begins, so that a text may join it

    def text(self, step: int, name: str, text: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def finish(self, status: Status) -> None:
        self.run.finish(exit_code=0 if status == "finished" else 1)


PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
"""Key of the config's `tracking` -> package."""


def missing_packages(wanted: Mapping[str, Any]) -> list[str]:
    """A line for every tracker (key -> value of the config) that is asked for and not installed."""
    asked = [key for key in PACKAGES if wanted[key] and importlib.util.find_spec(PACKAGES[key]) is None]
    return [
        f"tracking.{key}: {PACKAGES[key]} is not installed. Fix: pip install 'posttrain[tracking]'" for key in asked
    ]


def make_trackers(
    *, tensorboard: bool, mlflow: str | None, wandb: str | None, custom: str | None
) -> dict[str, Tracker]:
    """The trackers that are asked for, by their label; nothing is imported for them but a user's own.

    Raises:
        ConfigError: the user's own cannot be made.
    """
    found: dict[str, Tracker] = {}
    if tensorboard:
        found["tensorboard"] = TensorBoard()
    if mlflow:
        found["mlflow"] = MLflow(mlflow)
    if wandb:
        found["wandb"] = WandB(wandb)
    if custom:
        found["custom"] = _made(custom)
    return found


def _made(path: str) -> Tracker:
    cls = resolve(path, key="tracking.custom")
    try:
        return cls()
    except Exception as error:
        raise ConfigError(f"tracking.custom: {path}() raised {type(error).__name__}: {error}") from error


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        inner = flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
        found |= inner
    return found
