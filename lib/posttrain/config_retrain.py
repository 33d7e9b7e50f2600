"""The config of retrain_flow: that of a run, and when, on what and by how much a champion is replaced."""

from typing import Literal

from pydantic import Field, model_validator

from posttrain.config import RunConfig
from posttrain.config_section import Section


class Retrain(Section):
    """When the champion of a registry is trained on, and what its successor must prove."""

    registry: str
    """Folder or s3:// prefix of the champions; one for each model that is served."""
    measure: Literal["loss", "preference", "greedy_reward", "sampled_reward"] = "loss"
    """What both models are compared by, held-out row by row: of sft the loss of its answer, nats per token; of dpo the
    preference, nats by which a pair's chosen answer is likelier; or the reward of what the model answers to a row of
    eval.prompts, greedy or the mean of eval.samples."""
    margin: float = Field(default=0.0, ge=0)
    """Gain of the mean over rows that is not enough, in nats or reward."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Share of the resamples of the held-out rows whose gain must be above the margin."""
    replay: float = Field(default=0.0, ge=0)
    """Weight of the rows that the champion has seen beside those that are new, times that of their source; 0 trains on
    new rows alone."""
    schedule: str | None = None
    """When a deployed flow starts: a cron expression of five fields, UTC."""
    after: str | None = None
    """A deployed flow that starts this one when it has finished, as ImportFlow."""
    event: str | None = None
    """An event of Argo Events that starts this one."""

    @model_validator(mode="after")
    def can_be_deployed(self):
        if self.after is not None and self.event is not None:
            raise ValueError("after and event are both set; Metaflow deploys a flow with one of them")
        if self.schedule is not None and len(self.schedule.split()) != 5:
            raise ValueError(f'schedule "{self.schedule}" is no cron expression: minute hour day month weekday')
        return self


class RetrainConfig(RunConfig):
    """One config for all runs of retrain_flow; `model` is where the first champion starts from."""

    retrain: Retrain

    @model_validator(mode="after")
    def can_be_repeated(self):
        problems = []
        of_rows = {"sft": "loss", "dpo": "preference"}
        if self.method.name not in of_rows:
            problems.append(f"method.name: retrain_flow trains sft and dpo, the config is for {self.method.name}")
        elif self.retrain.measure in set(of_rows.values()) - {of_rows[self.method.name]}:
            problems.append(
                f"retrain.measure = {self.retrain.measure}: the rows of {self.method.name} are compared by "
                f"{of_rows[self.method.name]}, or by a reward"
            )
        if self.warmup is not None:
            problems.append("warmup: it would come before every run, from the champion too; set warmup: null")
        if self.retrain.measure.endswith("_reward") and self.eval.prompts is None:
            problems.append(f"retrain.measure = {self.retrain.measure}: no answers are asked for; set eval.prompts")
        if self.parallel.backend != "local" and not self.retrain.registry.startswith("s3://"):
            problems.append(
                f"retrain.registry: parallel.backend = {self.parallel.backend} runs every step in a container of its "
                "own; set an s3:// prefix"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self
