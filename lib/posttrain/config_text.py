"""What a person typed, in a config or on a command line: plain values and paths, or one kind of error."""

import json
from pathlib import Path
from typing import Any

import yaml

from posttrain.errors import ConfigError


def yaml_value(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is none, or a value that holds itself, as YAML can say, and so has no end.
    """
    try:
        value = yaml.safe_load(text)
        json.dumps(value, default=str, skipkeys=True)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(str(error).replace('in "<unicode string>", ', "at ")) from None
    return value


def file_path(name: str, *, where: str) -> tuple[Path, bool]:
    """The absolute path of a file's name, and whether that file is there.

    Raises:
        ConfigError: a NUL, a name too long, a home that is not there.
    """
    try:
        path = Path(name).expanduser().resolve()
        return path, path.is_file()
    except (ValueError, OSError, RuntimeError) as error:
        raise ConfigError(f"{where} {name!r} is no path: {error}") from None
