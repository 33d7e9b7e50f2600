"""Write docs/config.md and docs/config.schema.json from the schema in lib/posttrain/config.py. `make docs`."""

import json
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from posttrain.config import RunConfig, Section
from posttrain.config_retrain import Retrain
from posttrain.config_section import docstrings

DOCS = Path(__file__).resolve().parent
HEAD = """# Configuration

Generated from `lib/posttrain/config.py` by `make docs`; do not edit by hand.

A run is one YAML file (`configs/*.yaml`). An unknown key is an error, and all errors are
reported at once. On the command line a file is chosen with `--config FILE`, and single keys
are changed with `--config-value KEY=VALUE`, as often as needed, before or after `run`:

    python flows/grpo_flow.py run --config configs/grpo_tiny.yaml --config-value optim.lr=1e-4

In a file, `base: other.yaml` starts from another file (relative to the working directory) and
keys may be dotted. A plug-in is an import path, `package.module:name`; it is resolved before
anything is paid for.
"""


def sections_of(field: FieldInfo) -> list[type[Section]]:
    """The section that a field holds, several where it is one of several, or none."""
    options = (field.annotation, *get_args(field.annotation))
    return [option for option in options if isinstance(option, type) and issubclass(option, Section)]


def rows(section: type[Section], path: str, title: str = "Top level") -> list[str]:
    """Markdown lines of a section and the sections below it."""
    summary = (section.__doc__ or "").strip().splitlines()[0]
    table = [f"\n## {title}\n\n{summary}\n", "| key | type | default | meaning |", "|---|---|---|---|"]
    below: list[str] = []
    schema, meanings = section.model_json_schema()["properties"], docstrings(section)
    for name, field in section.model_fields.items():
        inner = sections_of(field)
        dotted = f"{path}.{name}" if path else name
        for each in inner:
            title = dotted if len(inner) == 1 else f"{dotted}, {name_of(each)}"
            below += rows(each, dotted, title)
        if inner:
            continue
        default = "required" if field.is_required() else f"`{json.dumps(field.get_default(), default=str)}`"
        meaning = " ".join(meanings[name].split())
        table.append(f"| `{name}` | {kind(schema[name])} | {default} | {meaning} |")
    return (table if len(table) > 3 else []) + below


def name_of(recipe: type[Section]) -> str:
    """How a config tells one section of several: `name: sft`."""
    return f"name: {get_args(recipe.model_fields['name'].annotation)[0]}"


def kind(schema: dict[str, Any]) -> str:
    """A property's type and bounds, short."""
    if options := schema.get("anyOf", schema.get("oneOf")):
        return " or ".join(dict.fromkeys(kind(option) for option in options))
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    if "pattern" in schema:
        return "import path"
    return " ".join([schema.get("type", "value"), *bounds])


def documents() -> dict[str, str]:
    """File name -> text of everything that is generated."""
    schema = json.dumps(RunConfig.model_json_schema(), indent=2, ensure_ascii=False)
    tables = [*rows(RunConfig, ""), *rows(Retrain, "retrain", "retrain, of retrain_flow")]
    return {"config.md": HEAD + "\n".join(tables) + "\n", "config.schema.json": schema + "\n"}


if __name__ == "__main__":
    for name, text in documents().items():
        (DOCS / name).write_text(text)
