"""The section `parallel` of a run config: where a run executes, on how much, and how a model is split over it."""

import re
from typing import Annotated, Literal

from pydantic import Field, JsonValue

from posttrain.config_section import Section

Decorator = Literal["kubernetes", "batch", "environment", "secrets", "retry", "timeout"]
"""Of Metaflow; @resources is written from the keys of `parallel`."""

MOST_RETRIES = 4
"""Metaflow counts six attempts: the first, these, and one that it keeps for @catch."""

SECRET = re.compile(r"(TOKEN|PASSWORD|SECRET|KEY|KEY_ID)$")
"""Ends of names of environment variables that nobody may read in a run's artifacts."""


class Parallel(Section):
    """Where and on how much the run executes."""

    backend: Literal["local", "kubernetes", "batch"] = "local"
    """Where Metaflow runs the steps."""
    orchestrator: Literal["ray", "verl"] = "ray"
    """Who starts policy ranks and generators and carries calls to them: Ray's actors, or the worker groups of verl's
    single_controller; the results are the same to the bit."""
    data: Annotated[int, Field(ge=1)] | Literal["auto"] = 2
    """Data-parallel policy ranks, over all nodes; auto is as many as the GPUs allow, one on CPUs."""
    tensor: int = Field(default=1, ge=1)
    """Ranks that share every matrix of a block, for each data-parallel rank; they should be GPUs of one node."""
    context: int = Field(default=1, ge=1)
    """Ranks that share the tokens of every pack, for each data-parallel rank, where a document is too long for one."""
    expert: int = Field(default=1, ge=1)
    """Data-parallel ranks that share the experts of a mixture-of-experts model."""
    nodes: int = Field(default=1, ge=1)
    """Machines of the train step."""
    gpus_per_node: int = Field(default=0, ge=0)
    """0 runs on CPUs."""
    cpus_per_node: int = Field(default=2, ge=1)
    """Requested from Kubernetes or Batch; on a laptop every core is used."""
    memory_gib: int = Field(default=8, ge=1)
    """Per node."""
    image: str | None = None
    """Container image with posttrain's dependencies."""
    queue: str | None = None
    """AWS Batch job queue."""
    decorators: dict[Literal["all", "training"], dict[Decorator, dict[str, JsonValue]]] = Field(default={})
    """Arguments of Metaflow's decorators on all steps, or on those that take the GPUs, as {training: {timeout: {hours:
    24}}}; those of kubernetes and batch hold where that is the backend: see docs/operations.md."""

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def data_ranks(self) -> int:
        """`data`, with auto worked out."""
        return self.data if self.data != "auto" else max(self.gpus // self.ranks_per_pack, 1)

    @property
    def ranks_per_pack(self) -> int:
        """Ranks that work on one pack together: `tensor` times `context`."""
        return self.tensor * self.context

    @property
    def ranks(self) -> int:
        """Policy ranks in all."""
        return self.data_ranks * self.ranks_per_pack

    def unfit(self, *, backend: str, pack_tokens: int) -> list[str]:
        """What the ranks cannot do: problems in words, of this section and of it with the model's and the data's."""
        problems = []
        what = f"parallel.data = {self.data_ranks}"
        what += f" times parallel.tensor = {self.tensor}" if self.tensor > 1 else ""
        what += f" times parallel.context = {self.context}" if self.context > 1 else ""
        if self.gpus and self.ranks > self.gpus:
            problems.append(f"{what} ranks need as many GPUs; the run asks for {self.gpus}")
        if self.gpus_per_node and self.tensor > self.gpus_per_node:
            problems.append(
                f"parallel.tensor = {self.tensor} exceeds parallel.gpus_per_node = {self.gpus_per_node}: "
                "ranks that share matrices must be on one node"
            )
        if max(self.tensor, self.context, self.expert) > 1 and backend == "transformers":
            problems.append(
                "parallel.tensor, parallel.context and parallel.expert split posttrain's own decoder only; set all to "
                "1, or model.backend: posttrain"
            )
        if self.context > 1 and pack_tokens % (2 * self.context):
            problems.append(
                f"data.pack_tokens = {pack_tokens} is no multiple of {2 * self.context}: parallel.context = "
                f"{self.context} ranks share a pack as two chunks each; choose "
                f"{pack_tokens + -pack_tokens % (2 * self.context)}"
            )
        if self.data_ranks % self.expert:
            problems.append(
                f"parallel.expert = {self.expert} does not divide parallel.data = {self.data_ranks}: "
                "experts are shared among data-parallel ranks"
            )
        return [*problems, *self._of_decorators()]

    def unfit_for_float8(self, *, backend: str, pack_tokens: int) -> list[str]:
        """What cannot multiply in float8, as far as a config tells; the model's own sides are checked in the plan."""
        problems, multiple = [], 16 * self.context
        if not self.gpus:
            problems.append("optim.precision: float8 needs GPUs, and the run has none; set parallel.gpus_per_node")
        if backend != "posttrain":
            problems.append("optim.precision: float8 needs posttrain's own decoder; set model.backend: posttrain")
        if pack_tokens % multiple:
            problems.append(
                f"data.pack_tokens = {pack_tokens}: float8 multiplies matrices whose sides are multiples of 16 on "
                f"every rank; choose {pack_tokens + -pack_tokens % multiple}, or optim.precision: bfloat16"
            )
        return problems

    def _of_decorators(self) -> list[str]:
        """What Metaflow would take, and a run could not live with."""
        problems = []
        for steps, decorators in self.decorators.items():
            where = f"parallel.decorators.{steps}"
            times = decorators.get("retry", {}).get("times", 0)
            if not isinstance(times, int) or not 0 <= times <= MOST_RETRIES:
                problems.append(
                    f"{where}.retry.times = {times!r}: Metaflow repeats a task at most {MOST_RETRIES} times; "
                    "after that `resume` goes on from the last checkpoint"
                )
            values = decorators.get("environment", {}).get("vars", {})
            if not isinstance(values, dict):
                problems.append(f"{where}.environment.vars = {values!r}: write it as {{NAME: value}}")
                continue
            problems += [
                f"{where}.environment.vars.{name}: a config is kept in the run's artifacts, where all can read it; "
                "give the name of a secret instead, in secrets.sources or kubernetes.secrets"
                for name in values
                if SECRET.search(name)
            ]
        return problems
