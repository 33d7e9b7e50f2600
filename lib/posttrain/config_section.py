"""What every section of a run config is, and how a plug-in is written."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Plugin = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", examples=["package.module:name"])]
"""An import path, `package.module:name`."""


class Section(BaseModel):
    """Immutable; an unknown key is an error, not a typo that trains for a day."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
