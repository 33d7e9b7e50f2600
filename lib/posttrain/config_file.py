"""A YAML file becomes a RunConfig, or one message with every problem in it."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from posttrain.config import Method, RunConfig
from posttrain.config_text import file_path, yaml_value
from posttrain.errors import ConfigError

STAND_IN: dict[Any, dict[str, str]] = {
    ("model",): {"path": "stand-in"},
    ("data",): {},
    ("reward",): {"function": "stand.in:value"},
    ("method", "teacher"): {"path": "stand-in"},
}
"""Sections that a config must have, as they are while the rest is looked at."""

RECIPES = tuple(get_args(option.model_fields["name"].annotation)[0] for option in get_args(get_args(Method)[0]))
"""Values of method.name, which pydantic puts into the path of a problem."""

ELSEWHERE = {
    "learning_rate": "lr",
    "max_steps": "num_steps",
    "total_training_steps": "num_steps",
    "gradient_checkpointing": "activation_checkpointing",
    "num_generations": "group_size",
    "max_completion_length": "max_new_tokens",
    "max_response_length": "max_new_tokens",
    "max_prompt_length": "max_prompt_tokens",
    "max_length": "pack_tokens",
    "sequence_len": "pack_tokens",
}
"""What other frameworks call a key, for a hint where no name of ours is near."""

UNNAMED = "config"
"""What a text is called that came from no file."""

TypedConfig = TypeVar("TypedConfig", bound=RunConfig)


def load_config(text: str, schema: type[TypedConfig] = RunConfig, *, where: str = UNNAMED) -> TypedConfig:
    """Parse and validate a YAML run config.

    A document may name another file as its `base`, and may override single keys with
    dotted paths: `{base: configs/grpo_tiny.yaml, optim.lr: 1e-4}`. Relative bases are
    resolved against the working directory.

    Args:
        schema: of a flow that has sections of its own.
        where: the file that the text is from.

    Raises:
        ConfigError: every problem at once, one per line, with its path, the value given, the file
            that says so and, for an unknown key, the nearest known one.
    """
    places: dict[tuple[str, ...], str] = {}
    return checked_config(_document(text, where=where, seen=(), places=places), schema, places=places)


def checked_config(
    document: dict[str, Any],
    schema: type[TypedConfig] = RunConfig,
    *,
    places: Mapping[tuple[str, ...], str] = MappingProxyType({}),
) -> TypedConfig:
    """What load_config() makes of a document that is read, and names no base.

    Args:
        places: path of a key -> the file that set it, for the messages.

    Raises:
        ConfigError: as load_config() does.
    """
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        problems = [
            line + _place(_key(problem), places)
            for problem in error.errors()
            for line in _explain(problem, schema).splitlines()
        ]
        if not any(problem["type"].startswith("union_tag") for problem in error.errors()):
            # what fits together depends on the recipe
            problems += _combinations(document, [_key(problem) for problem in error.errors()], schema)
        raise ConfigError("\n".join(dict.fromkeys(problems))) from None


def sections(text: str) -> set[str]:
    """Top-level keys of a config, its bases' among them, before anything is checked.

    Raises:
        ConfigError: it is no YAML mapping, or a base does not exist.
    """
    return set(_document(text, where=UNNAMED, seen=(), places={}))


def _document(text: str, *, where: str, seen: tuple[Path, ...], places: dict[tuple[str, ...], str]) -> dict[str, Any]:
    """The mapping that a text is, on top of its base; which file gave each key is noted in `places`."""
    try:
        document = yaml_value(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{where} must be a YAML mapping of sections, got {type(document).__name__}")
    base = document.pop("base", None)
    merged: dict[str, Any] = {}
    if base is not None:
        path, there = file_path(str(base), where=f"{where}: base")
        if path in seen:
            raise ConfigError(f"{where}: base {base} includes itself")
        if not there:
            raise ConfigError(f"{where}: base {base} does not exist (looked for {path})")
        merged = _document(path.read_text(), where=str(base), seen=(*seen, path), places=places)
    for key, value in document.items():
        _put(merged, str(key), value, where)
        places |= dict.fromkeys(_leaves((), {str(key): value}), where)
    return merged


def _leaves(above: tuple[str, ...], value: Any) -> list[tuple[str, ...]]:
    """Paths of the values that are no section."""
    if not isinstance(value, dict) or not value:
        return [above]
    return [leaf for key, inner in value.items() for leaf in _leaves((*above, *_parts(str(key))), inner)]


def _place(loc: tuple[int | str, ...], places: Mapping[tuple[str, ...], str]) -> str:
    """The file that set a key, or what is in it, as words at the end of a line."""
    path = tuple(map(str, loc))
    for leaf, where in places.items():
        if path and leaf[: len(path)] == path[: len(leaf)]:
            return "" if where == UNNAMED else f" (in {_from_here(where)})"
    return ""


def _from_here(where: str) -> str:
    """A file as a person names it who stands in the working directory."""
    path = Path(where)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else where


def _put(target: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a dotted key; a mapping is merged into the section it names, null removes what the base set."""
    *parents, leaf = _parts(key)
    for parent in parents:
        below = target.get(parent)
        if below is not None and not isinstance(below, dict):
            raise ConfigError(f"{where}: {key}: {parent} is a value, not a section")
        target[parent] = target = dict(below or {})
    if isinstance(value, dict) and isinstance(target.get(leaf), dict):
        merged = dict(target[leaf])
        for inner, inner_value in value.items():
            _put(merged, str(inner), inner_value, where)
        target[leaf] = merged
    else:
        target[leaf] = value


def _parts(key: str) -> list[str]:
    """The sections that a dotted key goes through. An import path, as reward.function may have for a key, is one; of a
    slice, as in eval.gate.loss[site=a.b], the dots are its own."""
    dotted, bracket, rest = key.partition("[")
    *parents, leaf = [dotted] if ":" in dotted else dotted.split(".")
    return [*parents, leaf + bracket + rest]


def _combinations(document: dict[str, Any], wrong: list[tuple[int | str, ...]], schema: type[RunConfig]) -> list[str]:
    """Impossible combinations among the values that are right; pydantic looks for them only when all are."""
    rest = json.loads(json.dumps(document, default=str))
    for loc in wrong:
        _at(rest, loc[:-1]).pop(loc[-1] if loc else None, None)
    lines: list[str] = []
    for _ in range(3):  # what was wrong and is now missing gets a stand-in of the right form
        try:
            schema.model_validate(rest)
        except ValidationError as error:
            lines = [line for p in error.errors() if not p["loc"] for line in _explain(p, schema).splitlines()]
            for loc in (_key(problem) for problem in error.errors() if problem["loc"]):
                _at(rest, loc[:-1])[loc[-1]] = dict(STAND_IN[loc]) if loc in STAND_IN else "stand.in:value"
    paths = [".".join(map(str, loc)) for loc in wrong]
    return [line for line in lines if not any(path and path in line for path in paths)]


def _at(document: Any, loc: tuple[int | str, ...]) -> dict[Any, Any]:
    """The section at a path; an empty one where there is none."""
    for part in loc:
        document = document.get(part) if isinstance(document, dict) else None
    return document if isinstance(document, dict) else {}


def _key(problem: Any) -> tuple[int | str, ...]:
    """The path a person wrote: pydantic adds which kind of a union it tried, and the name of the recipe."""
    loc = problem["loc"]
    if loc[:1] == ("method",) and loc[1:2] and loc[1] in RECIPES:
        loc = (loc[0], *loc[2:])
    return tuple(p for p in loc if not str(p).startswith(("function-", "literal[", "constrained-", "tuple[")))


def _explain(problem: Any, schema: type[RunConfig]) -> str:
    """One line of the form `path: what is wrong (got value); fix`; an impossible combination has one line each."""
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in _key(problem)).lstrip(".")
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1], schema)
        name = str(problem["loc"][-1])
        near = [n for n in [ELSEWHERE.get(name)] if n in known] or difflib.get_close_matches(name, known, 1, 0.5)
        hint = f'did you mean "{near[0]}"?' if near else f"known keys: {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    if problem["type"] == "union_tag_not_found":
        return f"{path}.name: required, and not set; one of {', '.join(RECIPES)}"
    if problem["type"] == "union_tag_invalid":
        near = difflib.get_close_matches(str(problem["ctx"]["tag"]), RECIPES, n=1, cutoff=0.5)
        hint = f'did you mean "{near[0]}"' if near else f"one of {', '.join(RECIPES)}"
        return f'{path}.name: no recipe of that name; {hint} (got "{problem["ctx"]["tag"]}")'
    if problem["type"] == "value_error":
        text = str(problem["ctx"]["error"])
        return f"{path}: {text}" if path else text
    if problem["type"] == "string_pattern_mismatch" and path == "model.revision":
        return f'{path}: write the full commit, 40 hex digits (got "{problem["input"]}")'
    if problem["type"] == "string_pattern_mismatch":
        return f'{path}: write it as package.module:name (got "{problem["input"]}")'
    if problem["type"] == "missing":
        return f"{path}: required, and not set"
    return f"{path}: {problem['msg'].lower()} (got {json.dumps(problem['input'], default=str)})"


def _known_keys(loc: tuple[int | str, ...], schema: type[RunConfig]) -> list[str]:
    section: Any = schema
    for part in loc:
        if isinstance(part, int) or section is None:  # an entry of a list: its section is the list's
            continue
        if isinstance(section, list):  # one of several recipes, told by its name
            section = next((s for s in section if part in get_args(s.model_fields["name"].annotation)), None)
            continue
        field = section.model_fields.get(part)
        options = [] if field is None else [field.annotation, *get_args(field.annotation)]
        found = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        section = found if len(found) > 1 else found[0] if found else None
    return list(section.model_fields) if isinstance(section, type) else []
