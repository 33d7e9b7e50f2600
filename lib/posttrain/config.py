"""The schema of every file in configs/: what a person writes, checked before anything runs.

Imports pydantic and the standard library only; posttrain/config_file.py reads the YAML.
The library below takes named arguments: this tree stops at steps/.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config_data import Data, DataSource
from posttrain.config_section import Plugin, Section

__all__ = ["Data", "DataSource", "FreshModel", "Parallel", "RunConfig", "Section"]


class FreshModel(Section):
    """Shape of a small Qwen3 drawn at random, as long as a pack, with a tokenizer trained on the run's own data."""

    hidden_size: int = Field(default=128, ge=8)
    """Width of the residual stream; the SwiGLU's is four times as wide."""
    num_layers: int = Field(default=4, ge=1)
    """Transformer blocks."""
    num_heads: int = Field(default=4, ge=1)
    """Query heads; head_dim is hidden_size / num_heads."""
    num_kv_heads: int = Field(default=2, ge=1)
    """Key and value heads, shared by groups of query heads."""
    vocab_size: int = Field(default=512, ge=300)
    """Upper bound for the trained tokenizer; the byte alphabet alone takes 259."""

    @model_validator(mode="after")
    def heads_divide(self):
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}, "
                f"and num_heads of num_kv_heads={self.num_kv_heads}"
            )
        return self


class Model(Section):
    """Which weights to start from: `path`, or `fresh`."""

    path: str | None = None
    """Hugging Face model folder (local or s3://), or a hub id."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """Hub commit, 40 hex digits; needed with a hub id, so that a run can be repeated."""
    fresh: FreshModel | None = None
    """Build a small model instead of loading one."""
    backend: Literal["posttrain", "transformers"] = "posttrain"
    """posttrain's own decoder, or transformers' class for an architecture that it does not define: slower, and refused
    where packed training cannot be proved right."""

    @model_validator(mode="after")
    def one_source(self):
        if (self.path is None) == (self.fresh is None):
            state = "both are" if self.path else "neither is"
            raise ValueError(f"set exactly one of path and fresh ({state} set); null drops one that the base has")
        return self


class Warmup(Section):
    """Supervised fine-tuning before the recipe proper."""

    num_steps: int = Field(default=100, ge=1)
    """Optimizer steps of the warm-up."""
    packs_per_step: int = Field(default=2, ge=1)
    """Packs in one optimizer step, over all ranks."""
    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate; decays linearly to zero."""


class GRPO(Section):
    """Group-relative policy optimisation (arXiv:2402.03300)."""

    name: Literal["grpo"] = "grpo"
    """The recipe."""
    group_size: int = Field(default=8, ge=2)
    """Completions sampled for each prompt; the group is its own baseline, so 1 has no signal."""
    normalize_std: bool = False
    """Divide advantages by the group's standard deviation; off is Dr. GRPO (arXiv:2503.20783)."""
    importance_cap: float = Field(default=2.0, ge=1)
    """Upper bound of the trainer/sampler probability ratio of a token."""
    kl_coef: float | None = Field(default=None, ge=0)
    """Weight of KL(policy || start) in the loss; 0 only measures it, null keeps no reference model."""


class Optim(Section):
    """AdamW and its schedule, for the recipe; the warm-up shares all but lr, schedule and num_steps."""

    num_steps: int = Field(default=40, ge=1)
    """Optimizer steps of the recipe."""
    lr: float = Field(default=1e-6, ge=0)
    """Peak learning rate; 0 changes nothing and is the paired baseline."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """After the linear warm-up: hold; decay to zero in a line; or half a cosine to a tenth; or hold and decay over the
    last fifth of the steps."""
    warmup_steps: int = Field(default=5, ge=0)
    """Steps over which the learning rate rises to its peak."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay of AdamW's first and second moments."""
    weight_decay: float = Field(default=0.0, ge=0)
    """On matrices only."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""


class Rollout(Section):
    """How the policy is sampled in training."""

    generator: Literal["transformers"] | Plugin = "transformers"
    """The embedded engine, or your own class."""
    prompts_per_step: int = Field(default=64, ge=1)
    """Groups in one optimizer step."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling, and of the logprobs trained on."""
    max_new_tokens: int = Field(default=16, ge=1)
    """A completion that reaches it is cut, tokens."""
    timeout_s: float = Field(default=600, gt=0)
    """Deadline of every call to a policy rank or generator, the start with its model load included, seconds."""


class Reward(Section):
    """What a completion is worth."""

    function: Plugin
    """`f(row, completion) -> float`, or a dict of named parts that sum to the reward."""
    timeout_s: float = Field(default=10, gt=0)
    """Deadline for one group, seconds; then its process is killed."""
    max_failures: int = Field(default=20, ge=0)
    """Groups that training may drop because their reward failed, and rows that an evaluation may leave out; one
    more stops the run."""


class Parallel(Section):
    """Where and on how much the run executes."""

    backend: Literal["local", "kubernetes", "batch"] = "local"
    """Where Metaflow runs the steps."""
    data: Annotated[int, Field(ge=1)] | Literal["auto"] = 2
    """Data-parallel policy ranks, over all nodes; auto is as many as the GPUs allow, one on CPUs."""
    tensor: int = Field(default=1, ge=1)
    """Ranks that share every matrix of a block, for each data-parallel rank; they should be GPUs of one node."""
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

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def data_ranks(self) -> int:
        """`data`, with auto worked out."""
        return self.data if self.data != "auto" else max(self.gpus // self.tensor, 1)

    @property
    def ranks(self) -> int:
        """Policy ranks in all."""
        return self.data_ranks * self.tensor


class Checkpoint(Section):
    """When training state is committed and how much is kept."""

    root: str | None = None
    """Folder or s3:// prefix of all runs' files; null is ./runs of where the run was started."""
    every_steps: int | None = Field(default=None, ge=1)
    """Commit after every so many steps; null goes by time alone."""
    every_minutes: float = Field(default=10, gt=0)
    """Whichever comes first; the last step always commits."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept; an older one goes only after the newer verifies."""


class Eval(Section):
    """Measurement on held-out rows."""

    every_steps: int = Field(default=10, ge=1)
    """Quick evaluation during training: one sample per row at the training temperature."""
    samples: int = Field(default=4, ge=1)
    """Samples per row in the final evaluation, beside one greedy answer."""


class RunConfig(Section):
    """One run."""

    seed: int = Field(default=0, ge=0)
    """Of the weights, the data order and the sampling; a run is a function of it."""
    model: Model
    data: Data
    warmup: Warmup | None = None
    """null starts the recipe from the model as it is."""
    method: GRPO = GRPO()
    optim: Optim = Optim()
    rollout: Rollout = Rollout()
    reward: Reward
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()

    @model_validator(mode="after")
    def fits_together(self):
        problems = []
        need = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        if need > self.data.pack_tokens:
            problems.append(
                f"data.max_prompt_tokens + rollout.max_new_tokens = {need} exceeds data.pack_tokens = "
                f"{self.data.pack_tokens}: a rollout must fit in a pack"
            )
        if self.warmup and not self.data.sources:
            problems.append("warmup needs data.sources; name one, or set warmup: null")
        if self.data.sources and not any(source.schedule[0][1] for source in self.data.sources):
            problems.append("data.sources: none has a weight above zero at draw 0; give one of them one")
        if self.optim.warmup_steps >= self.optim.num_steps and self.optim.schedule != "constant":
            problems.append(
                f"optim.warmup_steps = {self.optim.warmup_steps} leaves none of optim.num_steps = "
                f"{self.optim.num_steps} for the {self.optim.schedule} decay"
            )
        if self.rollout.prompts_per_step % self.parallel.data_ranks:
            problems.append(
                f"rollout.prompts_per_step = {self.rollout.prompts_per_step} is not divisible by parallel.data = "
                f"{self.parallel.data_ranks}; choose a multiple, so that the ranks share a step evenly"
            )
        problems += self._ranks_that_do_not_fit()
        if self.parallel.backend != "local" and not (self.checkpoint.root or "").startswith("s3://"):
            problems.append(
                f"parallel.backend = {self.parallel.backend} runs every step in a container of its own; "
                "set checkpoint.root to an s3:// prefix that all can reach"
            )
        if self.parallel.backend == "batch" and not self.parallel.queue:
            problems.append("parallel.backend = batch needs parallel.queue")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _ranks_that_do_not_fit(self) -> list[str]:
        parallel, problems = self.parallel, []
        what = f"parallel.data = {parallel.data_ranks}"
        what += f" times parallel.tensor = {parallel.tensor}" if parallel.tensor > 1 else ""
        if parallel.gpus and parallel.ranks > parallel.gpus:
            problems.append(f"{what} ranks need as many GPUs; the run asks for {parallel.gpus}")
        if parallel.gpus_per_node and parallel.tensor > parallel.gpus_per_node:
            problems.append(
                f"parallel.tensor = {parallel.tensor} exceeds parallel.gpus_per_node = {parallel.gpus_per_node}: "
                "ranks that share matrices must be on one node"
            )
        if max(parallel.tensor, parallel.expert) > 1 and self.model.backend == "transformers":
            problems.append(
                "parallel.tensor and parallel.expert split posttrain's own decoder only; set both to 1, or "
                "model.backend: posttrain"
            )
        if parallel.data_ranks % parallel.expert:
            problems.append(
                f"parallel.expert = {parallel.expert} does not divide parallel.data = {parallel.data_ranks}: "
                "experts are shared among data-parallel ranks"
            )
        return problems
