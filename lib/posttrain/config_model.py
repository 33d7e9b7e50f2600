"""The section `model` of a run config: which weights to start from, and which of them are trained."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config_section import Plugin, Section


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
    tokenizer: Plugin | None = None
    """Your own function, called with a folder and the run's seed, that writes there what AutoTokenizer opens, as
    `word_tokenizer()` does; null trains one on the run's texts."""

    @model_validator(mode="after")
    def heads_divide(self):
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}, "
                f"and num_heads of num_kv_heads={self.num_kv_heads}"
            )
        return self

    @property
    def shape(self) -> dict[str, int]:
        """The numbers among its keys."""
        return self.model_dump(exclude={"tokenizer"})


class LoRA(Section):
    """Train low-rank adapters and leave the weights as they are (arXiv:2106.09685)."""

    rank: int = Field(default=16, ge=1)
    """Width of the adapters' two matrices."""
    alpha: float = Field(default=32.0, gt=0)
    """Their product is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Linears that get one: a last component of the name, a dotted tail, or all-linear."""


class Origin(Section):
    """Where weights come from: `path`, or `fresh`."""

    path: str | None = None
    """Hugging Face model folder (local or s3://), a hub id, or run:SFTFlow/ID: what that run of the same
    checkpoint.root exported."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """Hub commit, 40 hex digits; needed with a hub id, so that a run can be repeated."""
    fresh: FreshModel | None = None
    """Build a small model instead of loading one."""

    @model_validator(mode="after")
    def one_source(self):
        if (self.path is None) == (self.fresh is None):
            state = "both are" if self.path else "neither is"
            raise ValueError(f"set exactly one of path and fresh ({state} set); null drops one that the base has")
        return self


class Model(Origin):
    """Which weights to start from (`path`, or `fresh`), and which of them to train."""

    lora: LoRA | None = None
    """null trains all weights."""
    backend: Literal["posttrain", "transformers"] = "posttrain"
    """posttrain's own decoder, or transformers' class for an architecture that it does not define: slower, and refused
    where packed training cannot be proved right."""

    @model_validator(mode="after")
    def adapters_fit(self):
        if self.lora and self.backend != "posttrain":
            raise ValueError("lora needs backend: posttrain; adapters sit in its Linears")
        return self
