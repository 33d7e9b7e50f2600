"""`package.module:name` in a config becomes the object it names. The only resolver."""

import importlib
from typing import Any

from posttrain.errors import ConfigError


def resolve(path: str, *, key: str) -> Any:
    """Import a plug-in.

    Args:
        path: `package.module:name`.
        key: the config key that holds it, for the error.

    Raises:
        ConfigError: the module or the name does not exist, or importing it raised.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        looked = "looked in the installed packages, PYTHONPATH and the folder where the run is started"
        raise ConfigError(f"{key}: {path}: {error}; {looked}") from None
    except Exception as error:
        raise ConfigError(f"{key}: {path}: importing {module_name} raised {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ConfigError(f"{key}: {path}: {module_name} has no {name!r}; it has {', '.join(public[:12])}")
    return getattr(module, name)
