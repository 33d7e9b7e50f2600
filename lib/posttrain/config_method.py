"""The section `method` of a run config: which recipe, told by its `name`, and the numbers of that recipe alone."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config_model import Origin
from posttrain.config_section import Section


class _Offline(Section):
    """A recipe that trains on rows, not on what it samples."""

    packs_per_step: int = Field(default=2, ge=1)
    """Packs in one optimizer step, over all ranks."""


class SFT(_Offline):
    """Supervised fine-tuning: the answers of data.sources are imitated."""

    name: Literal["sft"]
    """The recipe."""


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
    """A model that gives an answer a score: Bradley-Terry on pairs, or labels of single answers."""

    name: Literal["reward"]
    """The recipe."""
    kind: Literal["pairs", "labels"] = "pairs"
    """Rows of chosen and rejected, with a `margin` where they have one; or of an answer and its true or false
    `label`."""
    center_coef: float = Field(default=0.0, ge=0)
    """Weight of (chosen + rejected score)^2, which keeps scores near zero (arXiv:2312.09244); pairs only."""

    @model_validator(mode="after")
    def kind_fits(self):
        if self.center_coef and self.kind != "pairs":
            raise ValueError("center_coef is defined for kind: pairs; set it to 0")
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


Method = Annotated[SFT | DPO | RewardModel | Distill | GRPO, Field(discriminator="name")]
"""One recipe."""
