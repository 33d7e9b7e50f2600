"""What every section of a run config is, and how a plug-in is written."""

import ast
import inspect
import textwrap
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic_core import CoreSchema

Plugin = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", examples=["package.module:name"])]
"""An import path, `package.module:name`."""


class Section(BaseModel):
    """Immutable; an unknown key is an error, not a typo that trains for a day."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: "CoreSchema", handler: "GetJsonSchemaHandler") -> dict[str, Any]:
        """Each property with its key's docstring.

        They are read here and not by pydantic's use_attribute_docstrings, which does so where the classes are made:
        that was half of the import's time, in every process of a run.
        """
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for key, text in docstrings(cls).items():
            properties[key]["description"] = text
        return schema


def docstrings(section: type[Section]) -> dict[str, str]:
    """Key -> the string below it in the source of its class; inherited keys among them."""
    found: dict[str, str] = {}
    for each in reversed(section.__mro__):
        if not issubclass(each, Section):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(tree, ast.ClassDef)
        for key, below in pairwise(tree.body):
            if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name) and isinstance(below, ast.Expr):
                assert isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
                found[key.target.id] = inspect.cleandoc(below.value.value)
    return found
