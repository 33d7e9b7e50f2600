"""Command-line words become Metaflow's config options, so that a person can type the obvious ones.

`--config FILE` and `--config-value KEY=VALUE` are accepted anywhere on the line and
folded into the one `--config-value config {...}` that Metaflow understands (before its
sub-command). Metaflow's own spelling, `--config config FILE` and `--config-value config
DOCUMENT`, keeps working; a DOCUMENT is complete, or names its own `base`.
"""

import json
from pathlib import Path
from typing import Any

from posttrain.config_text import file_path, yaml_value
from posttrain.errors import ConfigError

NAME = "config"
"""Name of the one Config that every flow has."""


def metaflow_arguments(arguments: list[str], *, default: Path) -> list[str]:
    """Rewrite the words after the program's name.

    Args:
        arguments: `sys.argv[1:]`.
        default: the flow's own config file, the base of overrides when no file is named.

    Raises:
        ConfigError: an option lacks its value, a file does not exist, or a file is named twice.

    Example:
        ["run", "--config", "c.yaml", "--config-value", "optim.lr=1e-4"] ->
        ["--config-value", "config", '{"base": "/…/c.yaml", "optim.lr": "1e-4"}', "run"]
    """
    native, files, overrides, rest = _sorted_words(arguments)
    if not files and not overrides:
        return [*native, *rest]
    document: dict[str, Any] | None = None
    for option, value in zip(native[::3], native[2::3], strict=True):
        if option == "--config":
            files.append(value)
        else:
            document = _mapping(value)
    if len(files) + (document is not None) > 1:
        raise ConfigError("a run has one config; give --config once, and change keys with --config-value key=value")
    if document is None:
        document = {"base": str(_existing(files[0]) if files else default)}
    return ["--config-value", NAME, json.dumps(document | overrides, default=str), *rest]


def _sorted_words(arguments: list[str]) -> tuple[list[str], list[str], dict[str, Any], list[str]]:
    """Options in Metaflow's own spelling, our files, our overrides, and everything else, in order."""
    native: list[str] = []
    files: list[str] = []
    overrides: dict[str, Any] = {}
    rest: list[str] = []
    words = [part for word in arguments for part in _split_equals(word)]
    while words:
        word = words.pop(0)
        if word not in ("--config", "--config-value"):
            rest.append(word)
            continue
        value = _take(words, word)
        if value == NAME:  # Metaflow's tasks pass references like "kv.config" this way
            native += [word, NAME, _take(words, f"{word} {NAME}")]
        elif word == "--config":
            files.append(value)
        else:
            key, equals, text = value.partition("=")
            if not equals:
                raise ConfigError(f"{word} {value}: write it as key=value, for example optim.lr=1e-4")
            try:
                overrides[key] = yaml_value(text)
            except ValueError as error:
                raise ConfigError(f"{word} {value}: not YAML: {error}") from None
    return native, files, overrides, rest


def _split_equals(word: str) -> list[str]:
    """`--config=FILE` is `--config FILE`."""
    option, equals, value = word.partition("=")
    return [option, value] if equals and option in ("--config", "--config-value") else [word]


def _take(words: list[str], option: str) -> str:
    if not words:
        raise ConfigError(f"{option} needs a value")
    return words.pop(0)


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = yaml_value(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"--config-value {NAME} takes a YAML or JSON mapping, got {text!r}")
    return {str(key): inner for key, inner in value.items()}


def _existing(name: str) -> Path:
    path, there = file_path(name, where="--config")
    if not there:
        raise ConfigError(f"--config {name}: no such file (looked for {path})")
    return path
