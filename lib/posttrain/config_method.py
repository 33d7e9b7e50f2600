"""The section `method` of a run config: which recipe, told by its `name`, and the numbers of that recipe alone."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config_model import Origin
from posttrain.config_section import Plugin, Section


class _Offline(Section):
    """A recipe that trains on rows, not on what it samples."""

    packs_per_step: int = Field(default=2, ge=1)
    """Packs in one optimizer step, over all ranks."""


class Task(Section):
    """What a head of answers learns."""

    kind: Literal["mse", "bce"]
    """Squared error of a number, or cross-entropy of a label in 0 to 1."""
    coef: float = Field(default=0.1, gt=0)
    """Weight of its loss, which is divided by the trained tokens, as theirs is."""
    module: Plugin | None = None
    """Your own torch module, called with the hidden size, that gives one number; null is a linear map."""


class SFT(_Offline):
    """Supervised fine-tuning: the answers of data.sources are imitated."""

    name: Literal["sft"]
    """The recipe."""
    side: Plugin | None = None
    """Your own torch module, called with the hidden size, which makes of the `features` of answers what is added to the
    embeddings of the tokens that lead to them."""
    heads: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Task] = Field(default={})
    """Heads beside the LM head, by the name among the `labels` of answers that each learns, as {click: {kind: bce}}."""

    @model_validator(mode="after")
    def heads_have_names_of_their_own(self):
        if taken := {"score", "value", "side"}.intersection(self.heads):
            raise ValueError(f"heads: {', '.join(sorted(taken))} means another head; rename the label")
        return self


class DPO(_Offline):
    """Direct preference optimisation and its relatives (arXiv:2305.18290), on pairs of answers."""

    name: Literal["dpo"]
    """The recipe."""
    kind: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """Loss of a pair: DPO's own, SLiC's (arXiv:2305.10425), or IPO's (arXiv:2310.12036)."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is held to the reference."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability that a label is wrong; sigmoid only."""
    sft_coef: float = Field(default=0.0, ge=0)
    """Weight of the chosen answers' mean -log p (RPO, arXiv:2404.19733)."""
    gamma: float = Field(default=0.0, ge=0)
    """Margin that the chosen must win by, in units of beta times logprob; not for ipo."""
    length_normalised: bool = False
    """Divide an answer's score by its tokens."""
    reference_free: bool = False
    """Score answers by their logprob alone; with length_normalised and gamma it is SimPO (arXiv:2405.14734)."""

    @model_validator(mode="after")
    def kind_fits(self):
        if self.label_smoothing and self.kind != "sigmoid":
            raise ValueError(f"label_smoothing is defined for kind: sigmoid, not {self.kind}; set it to 0")
        if self.gamma and self.kind == "ipo":
            raise ValueError("kind: ipo has its margin in beta; set gamma to 0")
        return self


class RewardModel(_Offline):
    """A model that gives an answer a score: Bradley-Terry on pairs, labels of single answers, or ratings of several
    attributes."""

    name: Literal["reward"]
    """The recipe."""
    kind: Literal["pairs", "labels", "ratings"] = "pairs"
    """Rows of chosen and rejected, with a `margin` where they have one; of an answer and its true or false `label`; or
    of a conversation and numbers in the columns `attributes`."""
    attributes: tuple[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")], ...] = ()
    """ratings only: columns of numbers, a head each, trained by squared error; a row may lack some of them."""
    center_coef: float = Field(default=0.0, ge=0)
    """Weight of (chosen + rejected score)^2, which keeps scores near zero (arXiv:2312.09244); pairs only."""

    @model_validator(mode="after")
    def kind_fits(self):
        if self.center_coef and self.kind != "pairs":
            raise ValueError("center_coef is defined for kind: pairs; set it to 0")
        if (self.kind == "ratings") != bool(self.attributes):
            raise ValueError("kind: ratings needs attributes, the columns of its numbers; no other kind has them")
        taken = {"messages", "tools"}.intersection(self.attributes)
        if taken or len(set(self.attributes)) < len(self.attributes):
            raise ValueError(f"attributes {list(self.attributes)} must differ, and none may be messages or tools")
        return self


class Distill(_Offline):
    """A student learns a teacher's next-token distributions on the rows of data.sources."""

    name: Literal["distill"]
    """The recipe."""
    teacher: Origin
    """A model with the student's vocabulary; a fresh one is trained by the warm-up, in the student's place."""
    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """Divergence: covers the teacher, seeks its mode, or between the two (GKD, arXiv:2306.13649)."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Share of the teacher in the mixture of jsd."""
    temperature: float = Field(default=1.0, gt=0)
    """Of both distributions."""
    top_k: int | None = Field(default=None, ge=1)
    """The teacher's so many likeliest tokens at every position are written down before training, which then holds no
    teacher; all others count as one. null compares whole vocabularies, with the teacher beside the student."""


class GRPO(Section):
    """On-policy policy gradient over sampled completions; docs/rl.md names the published methods by their keys."""

    name: Literal["grpo"] = "grpo"
    """The recipe."""
    group_size: int = Field(default=8, ge=1)
    """Completions sampled for each prompt; where the group is its own baseline, 1 has no signal."""
    advantage: Literal["centered", "normalized", "leave_one_out", "batch_normalized", "gae", "teacher"] = "centered"
    """Reward less the group's mean; over the group's standard deviation; less the mean of the others; over the
    standard deviation of the whole step; less what a value head expects, token by token (PPO); or no reward: log p
    of each token under `teacher` less the policy's own (on-policy distillation)."""
    teacher: str | None = None
    """advantage teacher: a model with the policy's vocabulary, a folder (local or s3://) or run:SFTFlow/ID."""
    gae: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (1.0, 0.95)
    """advantage gae: gamma and lambda (arXiv:1506.02438)."""
    epochs: int = Field(default=1, ge=1)
    """Optimizer steps on each batch of completions."""
    loss: Literal["truncated", "truncated_sequence", "clipped", "sequence", "uncorrected"] = "truncated"
    """What a token does that is less likely under the trainer than under the sampler, or likelier: keep its gradient
    at a bounded weight, its own or its completion's; give none beyond `clip`, by its own ratio or its completion's; or
    count as if nothing differed, which is biased and there to compare with."""
    importance_cap: float = Field(default=2.0, ge=1)
    """truncated, truncated_sequence: upper bound of the trainer/sampler probability ratio of a token, or of a whole
    completion."""
    clip: tuple[Annotated[float, Field(gt=0, lt=1)], Annotated[float, Field(gt=0)]] | None = None
    """clipped, sequence: how far below and above 1 a ratio may be; null is 0.2 and 0.2, or 0.0003 and 0.0004. With
    advantage gae the second is also how far a value may be fitted from what it was before the step."""
    weigh: Literal["token", "sequence"] = "token"
    """Every trained token counts the same, or every completion."""
    kl_coef: float | None = Field(default=None, ge=0)
    """Weight of KL(policy || start); 0 only measures it, null keeps no reference model."""
    kl_in: Literal["loss", "reward"] = "loss"
    """A term of the loss, or a price of each token that all tokens up to it earn."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of that KL, from the sampled tokens; k1 is the one whose expectation is exact in the reward."""
    overlong_tokens: int | None = Field(default=None, ge=1)
    """The last so many of rollout.max_new_tokens cost reward, in a line down to -1."""
    replace_silent: bool = False
    """Sample other prompts in place of those whose completions all got the same reward."""

    @model_validator(mode="after")
    def fits_together(self):
        by_group = self.advantage not in ("gae", "teacher")
        if self.clip is not None and self.loss not in ("clipped", "sequence"):
            raise ValueError(f"clip does nothing with loss = {self.loss}; set loss to clipped or sequence")
        if by_group and self.group_size == 1:
            raise ValueError(f"group_size = 1 has no baseline with advantage = {self.advantage}; set 2 or more, or gae")
        if not by_group and self.replace_silent:
            raise ValueError(
                f"replace_silent is for groups that are their own baseline, not advantage = {self.advantage}"
            )
        if (self.advantage == "teacher") != (self.teacher is not None):
            raise ValueError("advantage = teacher and the key teacher go together; set both, or neither")
        if self.advantage == "gae" and self.loss.endswith("sequence"):
            raise ValueError(
                f"advantage = gae is of tokens, loss = {self.loss} of completions; set truncated or clipped"
            )
        if self.kl_in == "reward" and self.kl_coef is None:
            raise ValueError("kl_in = reward: kl_coef says at what price; set it")
        return self


Method = Annotated[SFT | DPO | RewardModel | Distill | GRPO, Field(discriminator="name")]
"""One recipe."""
