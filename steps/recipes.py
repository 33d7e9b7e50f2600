"""What the recipes differ in: their rows, their loss, their prompts. Nothing else in steps/ matches on the method."""

from dataclasses import dataclass, replace
from typing import Any

from posttrain.config import DPO, GRPO, SFT, Distill, Origin, RewardModel, RunConfig
from posttrain.data.turn_numbers import NOTHING, Numbers
from posttrain.errors import ConfigError
from posttrain.model.heads import NATIVE, SIDE, HeadSpec
from posttrain.model.lora import LoRA
from posttrain.model.losses import Loss
from posttrain.model.losses.distill import DivergenceLoss, TopKDistillLoss
from posttrain.model.losses.dpo import DPOLoss
from posttrain.model.losses.reward import BradleyTerryLoss, MultiTaskLoss, PointwiseLoss
from posttrain.model.losses.sft import SFTLoss
from posttrain.model.losses.tasks import TaskLoss
from posttrain.plugin import resolve
from posttrain.workflow.calibration import BINS
from posttrain.workflow.measures import NOT_JUDGED, REWARDS, in_order, pass_names
from posttrain.workflow.policy_model import Build
from posttrain.workflow.training import Training

WARMUP = "warmup"
"""The stage before the recipe proper; the recipe's own is called as the method."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What a recipe reads of data.sources and of data.held_out."""

    wanted: str
    """As in records.py."""
    held_out: str
    scored: bool = False
    """Scores are taken at the end of an answer: see Encoder."""
    numbers: Numbers = NOTHING
    """What is kept beside the text."""


def rows_of(config: RunConfig) -> Rows:
    """The kind of rows that the run's recipe trains and is evaluated on."""
    match config.method.name:
        case "grpo":
            return Rows(wanted="conversation", held_out="prompt")
        case "dpo":
            return Rows(wanted="preference", held_out="preference")
        case "reward" if config.method.kind == "ratings":
            return Rows(
                wanted="conversation",
                held_out="conversation",
                scored=True,
                numbers=Numbers(ratings=config.method.attributes),
            )
        case "reward":
            kind = "preference" if config.method.kind == "pairs" else "unpaired"
            return Rows(wanted=kind, held_out=kind, scored=True)
        case "sft":
            numbers = Numbers(features=_features(config.method), labels=tuple(config.method.heads))
            return Rows(wanted="conversation", held_out="conversation", numbers=numbers)
        case "distill":
            return Rows(wanted="conversation", held_out="conversation")


def _features(method: SFT) -> tuple[str, ...]:
    """What the module at the model's front says that it reads."""
    if method.side is None:
        return ()
    side = resolve(method.side, key="method.side")
    if why := features_problem(side):
        raise ConfigError(f"method.side: {method.side} {why}")
    return tuple(side.features)


def features_problem(side: Any) -> str:
    """What is wrong with the names of a module at the front, if anything."""
    names = getattr(side, "features", ())
    if names and not isinstance(names, str) and all(isinstance(name, str) for name in names):
        return ""
    return f'has features = {names!r}; give it the names that it reads, as features = ("gap_hours",)'


def loss_of(config: RunConfig, stage: str) -> Loss:
    """What a stage on rows minimises."""
    method = config.method
    if stage == WARMUP:
        return SFTLoss()
    match method:
        case DPO():
            return DPOLoss(**method.model_dump(exclude={"name", "packs_per_step"}))
        case RewardModel(kind="pairs"):
            return BradleyTerryLoss(center_coef=method.center_coef)
        case RewardModel(kind="labels"):
            return PointwiseLoss(kind="bce", label="label")
        case RewardModel(attributes=names):
            # Every rating counts the same; an answer that lacks one moves the shared layers that much less.
            same = {"kind": "mse", "outputs": len(names)}
            parts = [PointwiseLoss(label=name, column=number, **same) for number, name in enumerate(names)]
            return MultiTaskLoss(parts=tuple((1 / len(names), part) for part in parts))
        case Distill():
            kind = DivergenceLoss if method.top_k is None else TopKDistillLoss
            return kind(kind=method.kind, beta=method.beta, temperature=method.temperature)
        case SFT() if method.heads:
            parts = [
                (task.coef, PointwiseLoss(kind=task.kind, label=name, head=name)) for name, task in method.heads.items()
            ]
            return TaskLoss(policy=SFTLoss(), tasks=MultiTaskLoss(parts=tuple(parts)))
        case _:
            return SFTLoss()


def measures_of(config: RunConfig) -> list[tuple[Loss, dict[str, str]]]:
    """What the held-out rows of an offline recipe are measured by: a loss, and its metrics -> names of measures."""
    main, method = loss_of(config, config.method.name), config.method
    match method:
        case DPO():
            # Against the reference the starting model ties every pair by definition; log p alone compares it too.
            alone = DPOLoss(beta=1.0, reference_free=True)
            return [(main, {"loss": "loss", "margin": "margin"}), (alone, {"accuracy": "prefers_chosen"})]
        case RewardModel(kind="pairs"):
            binned = replace(main, bins=BINS)  # pyright: ignore[reportArgumentType]
            return [(binned, {name: name for name in ("loss", "accuracy", "margin")})]
        case RewardModel(kind="labels"):
            binned = replace(main, bins=BINS)  # pyright: ignore[reportArgumentType]
            return [(binned, {name: name for name in ("loss", "accuracy")})]
        case RewardModel():
            return [(main, {"loss": "loss"})]
        case Distill():
            return [(main, {"loss": "divergence"}), (SFTLoss(), {"loss": "loss"})]
        case SFT():
            return [(SFTLoss(), {"loss": "loss"})]  # of the tokens alone, whatever heads stand beside them
        case _:
            return [(main, {"loss": "loss"})]


def measure_names(config: RunConfig) -> list[str]:
    """Measures of the run's final evaluation that a gate may name."""
    return in_order((_of_answers(config) | _of_rows(config)) - NOT_JUDGED)


def sliced_names(config: RunConfig) -> list[str]:
    """Those that a gate may name of a slice of data.held_out: in RL of its answers, else of its rows; none without
    eval.slice_by."""
    if config.eval.slice_by is None:
        return []
    return in_order((_of_answers(config) if config.method.name == "grpo" else _of_rows(config)) - NOT_JUDGED)


def _of_answers(config: RunConfig) -> set[str]:
    found = set(REWARDS) if config.samples_completions else set()
    return found | (set(pass_names(config.eval.samples)) if has_passes(config) else set())


def _of_rows(config: RunConfig) -> set[str]:
    if config.method.name == "grpo":
        return set()
    measures = measures_of(config)
    found = {name for _, names in measures for name in names.values()}
    found |= {"calibration_error"} if any(getattr(loss, "bins", 0) for loss, _ in measures) else set()
    found |= {"abs_error"} if rows_of(config).numbers.ratings else set()
    return found | ({"perplexity"} if any(loss.reads == "tokens" for loss, _ in measures) else set())


def has_passes(config: RunConfig) -> bool:
    """Whether completions are judged by a function, whose 1 means solved; a reward model's score has no such point."""
    return config.samples_completions and config.reward is not None and config.reward.function is not None


def training_of(config: RunConfig, stage: str) -> Training:
    """The numbers of the optimizer in a stage; the warm-up decays linearly."""
    optim, pack_tokens = config.optim, config.data.pack_tokens
    if stage != WARMUP:
        return Training(**optim.model_dump(), pack_tokens=pack_tokens)
    assert config.warmup is not None, "a stage that the config does not have"
    steps = config.warmup.num_steps
    return Training(
        **optim.model_dump(exclude={"num_steps", "lr", "schedule", "warmup_steps"}),
        num_steps=steps,
        lr=config.warmup.lr,
        schedule="linear",
        warmup_steps=min(optim.warmup_steps, steps),
        pack_tokens=pack_tokens,
    )


def teacher_of(config: RunConfig) -> Origin | None:
    """The model that the run learns from, where it has one."""
    method = config.method
    if isinstance(method, Distill):
        return method.teacher
    return Origin(path=method.teacher) if isinstance(method, GRPO) and method.teacher is not None else None


def build_of(config: RunConfig, teacher_uri: str | None, *, trains: bool = True) -> Build:
    """What the recipe makes of the model; the warm-up trains it as it is.

    Args:
        trains: off to measure a model, whose adapters are merged or not yet there.
    """
    lora, method = config.model.lora if trains else None, config.method
    written = isinstance(method, Distill) and method.top_k is not None  # what the teacher says is in the token files
    return Build(
        lora=None if lora is None else LoRA(rank=lora.rank, alpha=lora.alpha, targets=lora.targets),
        scores=scores_of(config),
        heads=heads_of(config),
        value_head=isinstance(method, GRPO) and method.advantage == "gae",
        teacher_uri=None if written else teacher_uri,
        seed=config.seed,
    )


def scores_of(config: RunConfig) -> tuple[str, ...]:
    """What the outputs of the head `score` are called, of a recipe that trains one; one output has the head's name."""
    return (config.method.attributes or (NATIVE,)) if isinstance(config.method, RewardModel) else ()


def heads_of(config: RunConfig) -> dict[str, HeadSpec]:
    """Heads that SFT trains beside the LM head, and the module that it trains at the front."""
    if not isinstance(config.method, SFT):
        return {}
    heads: dict[str, HeadSpec] = {name: task.module or 1 for name, task in config.method.heads.items()}
    return heads if config.method.side is None else {SIDE: config.method.side, **heads}


def trains_on_rows(config: RunConfig) -> bool:
    """Whether data.sources are read at all."""
    return config.method.name != "grpo" or config.warmup is not None


def prompt_sets(config: RunConfig) -> dict[str, tuple[str, str]]:
    """Sets of questions for the generator: name -> (key in the config, source)."""
    if config.method.name == "grpo":
        assert config.data.prompts is not None, "the config's own check asks for prompts"
        return {
            "prompts": ("data.prompts", config.data.prompts),
            "held_out": ("data.held_out", config.data.held_out),
        }
    return {} if config.eval.prompts is None else {"questions": ("eval.prompts", config.eval.prompts)}


def asked_set(config: RunConfig) -> str:
    """The set that an evaluation asks."""
    return "held_out" if config.method.name == "grpo" else "questions"


def packs_per_step(config: RunConfig, stage: str) -> int:
    """Packs of a global batch of a stage on rows."""
    if stage == WARMUP:
        assert config.warmup is not None, "a stage that the config does not have"
        return config.warmup.packs_per_step
    assert config.method.name != "grpo", "RL packs what it samples"
    return config.method.packs_per_step
