"""The schema of every file in configs/: what a person writes, checked before anything runs.

Imports pydantic and the standard library only; posttrain/config_file.py reads the YAML.
The library below takes named arguments: this tree stops at steps/.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config_data import Data, DataSource
from posttrain.config_method import DPO, GRPO, SFT, Distill, Method, RewardModel
from posttrain.config_model import FreshModel, LoRA, Model, Origin
from posttrain.config_parallel import Parallel
from posttrain.config_reward import Reward
from posttrain.config_section import Plugin, Section

__all__ = [
    "DPO",
    "GRPO",
    "SFT",
    "Data",
    "DataSource",
    "Distill",
    "FreshModel",
    "LoRA",
    "Method",
    "Model",
    "Origin",
    "Parallel",
    "RewardModel",
    "RunConfig",
    "Section",
]


class Warmup(Section):
    """Supervised fine-tuning before the recipe proper."""

    num_steps: int = Field(default=100, ge=1)
    """Optimizer steps of the warm-up."""
    packs_per_step: int = Field(default=2, ge=1)
    """Packs in one optimizer step, over all ranks."""
    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate; decays linearly to zero."""


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
    precision: Literal["auto", "float32", "bfloat16", "bfloat16_stochastic", "float8", "float8_stochastic"] = "auto"
    """bfloat16 computes in it beside float32 master weights; bfloat16_stochastic keeps weights and moments in it too,
    rounded by chance, in less than half the memory; float8 in their place multiplies the blocks' linear layers in it
    and changes nothing else, for models from 1.7B on GPUs from sm_89; auto is bfloat16 on GPUs and float32 on CPUs."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward makes again to save memory: nothing, about half of a block, or all but a block's input (a
    third more work)."""
    deterministic: bool = False
    """The same bits from the same step on the same kind of GPU, slower; a CPU gives them anyway."""


class Rollout(Section):
    """How the policy is sampled in training."""

    generator: Literal["transformers", "vllm"] | Plugin = "transformers"
    """The embedded engine, vLLM, or your own class."""
    tensor: int = Field(default=1, ge=1)
    """GPUs that share one vLLM engine; those that `parallel` has beside the policy's ranks hold as many as fit."""
    sleep: bool = False
    """vLLM gives the memory of a GPU back while a policy rank on the same GPU trains: for models that would not fit
    beside it, slower."""
    environment: Plugin | None = None
    """Your own class with `async def rollout(row, talk)`: episodes of several turns, in the place of one completion.
    Its attribute `constraint` may name a rule of which tokens may come next (`posttrain/data/constraint.py`)."""
    prompts_per_step: int = Field(default=64, ge=1)
    """Groups in one optimizer step."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling, and of the logprobs trained on."""
    max_new_tokens: int = Field(default=16, ge=1)
    """A completion that reaches it is cut, tokens."""
    timeout_s: float = Field(default=600, gt=0)
    """Deadline of every call to a policy rank or generator, the start with its model load included, seconds."""
    generators: int = Field(default=1, ge=1)
    """Copies of the engine that training samples with, each with a scheduler of its own; without GPUs for them alone,
    as many share that of each policy rank."""
    max_staleness: int = Field(default=0, ge=0)
    """Optimizer steps by which the weights that sampled a token may be behind those that it trains; 0 samples and
    trains in turn, more lets generators work while the policy trains."""
    max_failures: int = Field(default=2, ge=0)
    """Generators that may die or hang and are replaced, and groups that may be dropped because a generator raised; one
    more of either stops the run."""


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
    """Quick evaluation during training: the loss on data.held_out; in RL one sample per row at the training
    temperature."""
    samples: int = Field(default=4, ge=1)
    """Samples per row in the final evaluation, beside one greedy answer."""
    prompts: str | None = None
    """Questions that the models of an offline recipe are asked in the final evaluation, rows like data.prompts, never
    trained on; `reward` scores the answers, and null asks none. RL asks data.held_out."""
    slice_by: str | None = None
    """Column of data.held_out, as `lang`; the final evaluation is also told for each of its values, at most 50."""
    lm_eval: tuple[str, ...] = ()
    """Tasks of EleutherAI's lm-eval (the extra `eval`) that both models are put to at the end: its names, or
    `folder/name` for a YAML file of yours in that folder."""
    gate: dict[str, Annotated[float, Field(ge=0)]] = Field(default={})
    """Measure of the final evaluation -> by how much the trained model may be worse than the one it started from; else
    the run fails before its export. {loss: 0} forbids any harm; with slice_by: lang, {"loss[lang=de]": 0} any to the
    rows whose lang is de."""
    deliver: Literal["last", "best"] = "last"
    """Weights that an offline recipe hands on: the last, or those of the quick evaluation with the least loss."""


class Tracking(Section):
    """Where metrics go beside the run's JSONL files; what fails there is counted and stops nothing."""

    tensorboard: bool = False
    """Event files in `tensorboard/` of the run's folder."""
    mlflow: str | None = None
    """URI of the tracking server; its credentials are in MLFLOW_TRACKING_USERNAME and _PASSWORD, or _TOKEN."""
    wandb: str | None = None
    """Project; WANDB_API_KEY and WANDB_MODE=offline are read from the environment."""
    custom: Plugin | None = None
    """Your own class, made without arguments: see Tracker in `posttrain/workflow/tracking.py`."""

    @model_validator(mode="after")
    def no_credentials(self):
        if self.mlflow and "@" in self.mlflow.split("://")[-1].split("/")[0]:
            raise ValueError("mlflow holds a password; use MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
        return self


class RunConfig(Section):
    """One run."""

    seed: int = Field(default=0, ge=0)
    """Of the weights, the data order and the sampling; a run is a function of it."""
    model: Model
    data: Data
    warmup: Warmup | None = None
    """null starts the recipe from the model as it is."""
    method: Method = GRPO()
    optim: Optim = Optim()
    rollout: Rollout = Rollout()
    reward: Reward | None = None
    """Needed where completions are scored: by RL, and by eval.prompts."""
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    tracking: Tracking = Tracking()

    @property
    def samples_completions(self) -> bool:
        """Whether this run has a generator and a reward: in training, or in its evaluation."""
        return self.method.name == "grpo" or self.eval.prompts is not None

    @model_validator(mode="after")
    def fits_together(self):
        problems = [*self._missing(), *self._of_method(), *self._of_heads(), *self._of_hardware()]
        if self.data.sources and not any(source.schedule[0][1] for source in self.data.sources):
            problems.append("data.sources: none has a weight above zero at draw 0; give one of them one")
        if self.optim.warmup_steps >= self.optim.num_steps and self.optim.schedule != "constant":
            problems.append(
                f"optim.warmup_steps = {self.optim.warmup_steps} leaves none of optim.num_steps = "
                f"{self.optim.num_steps} for the {self.optim.schedule} decay"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _missing(self) -> list[str]:
        """What this recipe needs and the config does not have."""
        problems, name = [], self.method.name
        if self.reward is None and self.samples_completions:
            who = "method grpo" if name == "grpo" else "eval.prompts"
            problems.append(f"reward: required, and not set; {who} has completions scored: set reward.function")
        if self.reward and not (self.reward.function or self.reward.model or self.rollout.environment):
            problems.append("reward.function: required, and not set; or set reward.model, or rollout.environment")
        if name == "grpo" and self.data.prompts is None:
            problems.append("data.prompts: required, and not set; method grpo trains on the answers to them")
        if name != "grpo" and not self.data.sources:
            problems.append(f"data.sources: required, and not set; method {name} trains on their rows")
        if name == "grpo" and self.warmup and not self.data.sources:
            problems.append("warmup needs data.sources; name one, or set warmup: null")
        if isinstance(self.method, Distill) and self.method.teacher.fresh and not self.warmup:
            problems.append("method.teacher.fresh knows nothing yet; set warmup, which trains it, or teacher.path")
        return problems

    def _of_method(self) -> list[str]:
        """What the recipe and the other sections do not allow together."""
        problems = []
        need = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        if self.samples_completions and need > self.data.pack_tokens:
            problems.append(
                f"data.max_prompt_tokens + rollout.max_new_tokens = {need} exceeds data.pack_tokens = "
                f"{self.data.pack_tokens}: a rollout must fit in a pack"
            )
        if self.method.name == "grpo" and (self.method.overlong_tokens or 0) > self.rollout.max_new_tokens:
            problems.append(
                f"method.overlong_tokens = {self.method.overlong_tokens} is more than rollout.max_new_tokens = "
                f"{self.rollout.max_new_tokens}"
            )
        if self.method.name == "grpo" and self.rollout.prompts_per_step % self.parallel.data_ranks:
            problems.append(
                f"rollout.prompts_per_step = {self.rollout.prompts_per_step} is not divisible by parallel.data = "
                f"{self.parallel.data_ranks}; choose a multiple, so that the ranks share a step evenly"
            )
        if self.method.name == "grpo" and self.eval.prompts is not None:
            problems.append("eval.prompts: RL is evaluated on data.held_out; remove eval.prompts")
        if self.method.name == "reward" and self.eval.prompts is not None:
            problems.append("eval.prompts: a reward model answers nothing; remove eval.prompts")
        if self.method.name == "reward" and self.eval.lm_eval:
            problems.append("eval.lm_eval: a reward model writes no text; remove eval.lm_eval")
        if isinstance(self.method, RewardModel) and self.method.kind != "pairs" and self.warmup:
            kind = self.method.kind
            problems.append(f"warmup: answers with {kind} are no demonstrations, some are bad; set warmup: null")
        if self.method.name in ("dpo", "reward") and self.data.over_long == "split":
            problems.append("data.over_long = split: pairs cannot be split; choose error, drop or truncate")
        return problems

    def _of_heads(self) -> list[str]:
        """What the recipe reads of models, and where."""
        problems, method = [], self.method
        critic = method.name == "grpo" and method.advantage == "gae"
        if (critic or method.name in ("reward", "distill")) and self.model.backend != "posttrain":
            who = "method.advantage = gae" if critic else f"method {method.name}"
            problems.append(f"model.backend = transformers: {who} needs posttrain's own decoder")
        if isinstance(method, SFT) and (method.heads or method.side):
            if self.model.backend != "posttrain":
                problems.append("model.backend = transformers: method.heads and side need posttrain's own decoder")
            if method.heads and self.parallel.context > 1:
                problems.append("parallel.context > 1 splits the answers that method.heads read; set it to 1")
        if isinstance(method, Distill) and method.top_k and self.data.tokenize == "online":
            problems.append("method.top_k writes into token files: set data.tokenize: ahead, or top_k: null")
        return problems

    def _of_hardware(self) -> list[str]:
        problems = self.parallel.unfit(backend=self.model.backend, pack_tokens=self.data.pack_tokens)
        problems += self._of_generators()
        if self.optim.precision.startswith("float8"):
            problems += self.parallel.unfit_for_float8(backend=self.model.backend, pack_tokens=self.data.pack_tokens)
        if self.parallel.backend != "local" and not (self.checkpoint.root or "").startswith("s3://"):
            problems.append(
                f"parallel.backend = {self.parallel.backend} runs every step in a container of its own; "
                "set checkpoint.root to an s3:// prefix that all can reach"
            )
        if self.parallel.backend == "batch" and not self.parallel.queue:
            problems.append("parallel.backend = batch needs parallel.queue")
        return problems

    def _of_generators(self) -> list[str]:
        """What the generators cannot do on these GPUs."""
        rollout, gpus, ranks, problems = self.rollout, self.parallel.gpus, self.parallel.ranks, []
        alone = gpus >= ranks + rollout.generators * rollout.tensor
        if rollout.generator != "vllm" and (rollout.tensor > 1 or rollout.sleep):
            problems.append("rollout.tensor and rollout.sleep are vLLM's; set rollout.generator: vllm")
        uneven = rollout.generators > ranks and rollout.generators % ranks > 0
        if self.method.name == "grpo" and gpus and not alone and (rollout.tensor > 1 or uneven):
            problems.append(
                f"rollout.generators = {rollout.generators} of rollout.tensor = {rollout.tensor} GPUs do not fit on "
                f"{gpus} GPUs with {ranks} policy ranks: room is for as many of a single GPU beside each rank, or for "
                f"{max(gpus - ranks, 0)} GPUs without a rank"
            )
        if rollout.sleep and (alone or not gpus):
            where = "has GPUs of its own" if gpus else "runs on CPUs"
            problems.append(f"rollout.sleep: the generator {where}, so nothing would be gained; set it to false")
        return problems
