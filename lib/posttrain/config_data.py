"""The section `data` of a run config: where rows come from, and how they become packs."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, field_validator, model_validator

from posttrain.config_section import Section

Format = Literal["messages", "prompt_completion", "sharegpt", "alpaca", "text", "preference", "unpaired"]
"""Forms of a record that posttrain/data/records.py reads: of a conversation (a text is one assistant turn), of a pair
of answers, of an answer and its label."""


File = Annotated[str, Field(min_length=1)]


class DataSource(Section):
    """One source of training rows: .jsonl, .parquet or .arrow files (one, a folder, a glob or a dataset saved by
    Hugging Face; local or s3://), or `package.module:function` called with the seed."""

    path: File | Annotated[tuple[File, ...], Field(min_length=1)]
    """Files, or an import path; a list names several files as one source."""
    weight: PositiveFloat | tuple[tuple[NonNegativeInt, NonNegativeFloat], ...] = 1.0
    """Share of the draws, relative to the other sources; or [[draw, weight], ...], linear in between, in steps of
    1,024 draws."""
    epochs: float | None = Field(default=None, gt=0)
    """At most so many passes over its rows (0.5 draws half of them once); null repeats it for ever."""
    format: Format | None = None
    """Of its records; null recognises each by its columns, and refuses one that fits none or several."""
    role_map: dict[str, str] = Field(default={})
    """Role in the records -> system, developer, user, assistant or tool."""

    @model_validator(mode="before")
    @classmethod
    def of_a_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def schedule_ascends(self):
        if isinstance(self.weight, tuple):
            draws = [draw for draw, _ in self.weight]
            if not draws or draws != sorted(set(draws)) or not any(weight for _, weight in self.weight):
                raise ValueError(f"weight {list(map(list, self.weight))} needs ascending draws and a weight above zero")
        return self

    @property
    def schedule(self) -> tuple[tuple[int, float], ...]:
        """The weight as (draw, weight) pairs."""
        return self.weight if isinstance(self.weight, tuple) else ((0, self.weight),)


class Data(Section):
    """What is trained and evaluated on. Common record formats are recognised by their columns."""

    sources: tuple[DataSource, ...] = ()
    """Training rows of the offline recipes and the warm-up, mixed by weight; a string is one source."""
    prompts: str | None = None
    """What RL asks: rows with `messages` or `prompt`, and whatever fields the reward reads; a `prompt` becomes
    `messages`."""
    held_out: str
    """Rows like those that the recipe trains on (in RL like prompts), never trained on; the evaluation."""
    max_prompt_tokens: int = Field(default=64, ge=1)
    """A longer prompt is refused, tokens."""
    pack_tokens: int = Field(default=1024, ge=16)
    """Size T of a pack, the unit of a forward pass, tokens."""
    tokenize: Literal["ahead", "online"] = "ahead"
    """Write token files first, or tokenise while training: for sources that are too large to store twice."""
    train_on: Literal["weights", "all", "last"] = "weights"
    """Assistant turns that are trained: each by its `weight` (1 where it has none), all, or the last."""
    over_long: Literal["error", "drop", "truncate", "split"] = "error"
    """What becomes of a row that is longer than a pack or the model."""
    max_bad_rows: int = Field(default=0, ge=0)
    """Rows of all sources that may be left out for a fault of theirs, each counted by its cause; online a row counts
    every time that it is drawn."""

    @field_validator("sources", mode="before")
    @classmethod
    def of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | dict) else value or ()
