"""What a retraining run is about: the champion of a registry, and the rows that it has not been trained on."""

import json
from typing import Any

from posttrain import storage
from posttrain.config import RunConfig
from posttrain.config_file import load_config
from posttrain.config_retrain import RetrainConfig
from posttrain.data.arrivals import arrived, hashed_files
from posttrain.data.source import is_file, read_rows
from posttrain.errors import DataError
from posttrain.manifest import json_sha256
from posttrain.workflow import registry
from posttrain.workflow.compare import MIN_ROWS
from steps.recipes import rows_of

FUNCTION = "function"
"""In the place of a hash, for a source that is a function: it is new once."""


def look(config: RetrainConfig) -> dict[str, Any]:
    """What came since the champion was trained.

    Returns:
        news: "some", or "none" where a run has nothing to do; why, for people.
        registry: its absolute URI; parent and model_uri: the champion, None where there is none.
        files: what is new, with its hash; sources: of each the new files, and those that are replayed.
        key: of the candidate that this makes, for registry.tried().

    Raises:
        DataError: a source names nothing, or there are too few held-out rows to compare by.
    """
    where = storage.absolute(config.retrain.registry)
    champion = registry.champion(where)
    seen = {} if champion is None else champion.manifest["data"]
    files: dict[str, str] = {}
    sources = []
    for number, entry in enumerate(config.data.sources):
        now = _files(entry.path, key=f"data.sources[{number}]")
        new = arrived(now, seen)
        files |= {uri: now[uri] for uri in new}
        sources.append({"new": new, "old": sorted(set(now) - set(new)) if config.retrain.replay else []})
    parent = None if champion is None else champion.version
    key = json_sha256({"parent": parent, "files": files, "config": config.model_dump(mode="json")})
    news, why = _news(where, parent, files, key)
    if news == "some":
        _check_rows(config)
    return {
        "news": news,
        "why": why,
        "registry": where,
        "parent": parent,
        "model_uri": None if champion is None else champion.model_uri,
        "files": files,
        "sources": sources,
        "key": key,
    }


def retrained(config: RetrainConfig, found: dict[str, Any]) -> RunConfig:
    """The config of the run that look() found news for: from the champion, on what is new and what is replayed."""
    document = config.model_dump(mode="json", exclude={"retrain"})
    sources = []
    for entry, part in zip(document["data"]["sources"], found["sources"], strict=True):
        if part["new"]:
            sources.append(entry | {"path": _path(part["new"])})
        if part["old"]:
            weight = _times(entry["weight"], config.retrain.replay)
            sources.append(entry | {"path": _path(part["old"]), "weight": weight})
    document["data"]["sources"] = sources
    if found["model_uri"] is not None:
        document["model"] |= {"path": found["model_uri"], "revision": None, "fresh": None}
    return load_config(json.dumps(document))


def _news(where: str, parent: int | None, files: dict[str, str], key: str) -> tuple[str, str]:
    if not files:
        return "none", f"nothing new: version {parent} of {where} was trained on all files that are there"
    if (became := registry.tried(where, parent, key)) is not None:
        return "none", f"the {len(files)} new files were {became}"
    start = "the config's model, as there is no champion" if parent is None else f"version {parent}"
    return "some", f"{len(files)} new files, trained on from {start}"


def _files(path: str | tuple[str, ...], *, key: str) -> dict[str, str]:
    if not isinstance(path, str):
        return {uri: mark for each in path for uri, mark in _files(each, key=key).items()}
    return hashed_files(path, key=key) if is_file(path) else {path: FUNCTION}


def _path(files: list[str]) -> str | list[str]:
    return files[0] if len(files) == 1 else files


def _times(weight: Any, factor: float) -> Any:
    """A source's weight, or every point of its schedule, times a factor."""
    return [[draw, point * factor] for draw, point in weight] if isinstance(weight, list) else weight * factor


def _check_rows(config: RetrainConfig) -> None:
    of_rows = not config.retrain.measure.endswith("_reward")
    key, wanted = ("data.held_out", rows_of(config).held_out) if of_rows else ("eval.prompts", "prompt")
    source = config.data.held_out if of_rows else config.eval.prompts
    assert source is not None, "the config's own check asks for questions"
    if (count := len(read_rows(source, key=key, seed=config.seed, wanted=wanted))) < MIN_ROWS:
        raise DataError(f"{key}: {source} has {count} rows; to compare two models takes {MIN_ROWS} at least")
