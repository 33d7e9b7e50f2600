"""The section `reward` of a run config: who judges a completion, and what a failure costs."""

from typing import Annotated

from pydantic import Discriminator, Field, Tag, model_validator

from posttrain.config_section import Plugin, Section

Functions = Annotated[
    Annotated[Plugin, Tag("function-path")] | Annotated[dict[Plugin, float], Tag("function-sum")],
    Discriminator(lambda value: "function-sum" if isinstance(value, dict) else "function-path"),
]
"""One function, or several with their weights in a sum."""


class Reward(Section):
    """What a completion is worth: by `function`, or by a reward model."""

    function: Functions | None = None
    """`f(row, completion) -> float`, or a dict of named parts that sum to the reward; or `{path: weight}`: a weighted
    sum, each function's value a part. docs/rl.md lists the built-in ones."""
    model: str | None = None
    """A folder with the head `score`, as the recipe reward exports it (local or s3://), or run:RewardFlow/ID; it reads
    the row's messages and the completion, on a CPU."""
    timeout_s: float = Field(default=10, gt=0)
    """Deadline for one group, and for the environment's part of one turn (ten times as long for a whole episode),
    seconds; then its process is killed."""
    workers: int = Field(default=2, ge=1)
    """Processes that score, each one group at a time, where the run was started; each holds a copy of `model`. As many
    hold rollout.environment."""
    max_failures: int = Field(default=20, ge=0)
    """Groups that training may drop because their reward failed, as many because their environment did, and rows that
    an evaluation may leave out; one more stops the run."""
    heads: dict[str, float] = Field(default={})
    """Of a reward model with several ratings: rating -> weight in the sum that is the reward; each part is logged."""

    @model_validator(mode="after")
    def one_judge(self):
        if self.function is not None and self.model is not None:
            raise ValueError("set exactly one of function and model (both are set); null drops one that the base has")
        if isinstance(self.function, dict) and not any(self.function.values()):
            raise ValueError("function: no weight is other than zero; give one of the functions a weight")
        if self.heads and self.model is None:
            raise ValueError("heads are of a reward model; set model, or leave heads out")
        return self
