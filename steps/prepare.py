"""Sources and model become folders of the run, published with hashes: the snapshot that everything later reads."""

import os
import shutil
from pathlib import Path
from typing import Any

from posttrain import storage
from posttrain.config import FreshModel, RunConfig
from posttrain.data.records import question_key
from posttrain.data.source import read_rows, stored_rows, write_rows
from posttrain.data.tokenizer import train_tokenizer
from posttrain.data.types import Row
from posttrain.errors import DataError, ModelError
from posttrain.manifest import MANIFEST, read_manifest
from posttrain.model.build import build_model, fresh_config
from posttrain.model.families import decoder_config
from posttrain.model.load import read_config

WANTED = {"prompts": "prompt", "held_out": "prompt", "demonstrations": "conversation"}
"""What each set's records are read as."""


def prepare(config: RunConfig, *, root: str) -> dict[str, Any]:
    """Read every row once, and bring or build the model.

    Returns:
        data: uri, rows per set and sha256 per file.
        model: uri and architecture.

    Raises:
        DataError: a source is empty or malformed, or training rows repeat held-out ones.
        ModelError: the model folder is not one that the decoder can load.
    """
    data_uri, model_uri = storage.join(root, "data"), storage.join(root, "model")
    storage.ensure_folder(data_uri, lambda folder: _write_data(config, folder))
    folder = storage.fetch(data_uri)
    rows = {path.stem: stored_rows(path) for path in sorted(folder.glob("*.parquet"))}
    storage.ensure_folder(model_uri, lambda target: _write_model(config, target, rows))
    hf_config = read_config(storage.fetch(model_uri))
    files = read_manifest(folder)["files"]
    return {
        "data": {
            "uri": data_uri,
            "rows": {name: len(found) for name, found in rows.items()},
            "sha256": {name: entry["sha256"] for name, entry in files.items()},
        },
        "model": {"uri": model_uri, "family": hf_config["model_type"], "hidden_size": hf_config["hidden_size"]},
    }


def _write_data(config: RunConfig, folder: Path) -> None:
    sources = {"prompts": config.data.prompts, "held_out": config.data.held_out}
    if config.warmup and config.data.demonstrations:
        sources["demonstrations"] = config.data.demonstrations
    sets = {
        name: read_rows(source, key=f"data.{name}", seed=config.seed, wanted=WANTED[name])
        for name, source in sources.items()
    }
    held_out = {question_key(row) for row in sets["held_out"]}
    for name in sets.keys() - {"held_out"}:
        for number, row in enumerate(sets[name]):
            if question_key(row) in held_out:
                raise DataError(
                    f"data.{name}, row {number} repeats a held-out question: {question_key(row)[:120]!r}; "
                    "remove it from one of the two, or the evaluation measures memory"
                )
    for name, rows in sets.items():
        write_rows(rows, folder / f"{name}.parquet")


def _write_model(config: RunConfig, folder: Path, rows: dict[str, list[Row]]) -> None:
    if config.model.fresh:
        _build(config.model.fresh, folder, rows, seed=config.seed)
        return
    assert config.model.path is not None, "the config's own check lets exactly one of path and fresh through"
    source = _local_folder(config.model.path, config.model.revision)
    decoder_config(read_config(source))
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors":
            _link(path.resolve(), folder / path.name)
        elif path.suffix in (".json", ".jinja", ".txt", ".model") and path.name != MANIFEST:
            shutil.copyfile(path, folder / path.name)
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"model.path: {config.model.path} holds no .safetensors file")


def _build(fresh: FreshModel, folder: Path, rows: dict[str, list[Row]], *, seed: int) -> None:
    texts = (
        f"{message['role']}\n{message['content']}\n"
        for found in rows.values()
        for row in found
        for message in row["messages"]
    )
    size = train_tokenizer(texts, folder, vocab_size=fresh.vocab_size)
    shape = fresh.model_dump(exclude={"vocab_size"})
    build_model(folder, fresh_config(vocab_size=size, **shape), seed=seed)


def _local_folder(path: str, revision: str | None) -> Path:
    """The model's files on this machine, downloaded if they are not."""
    if storage.is_s3(path):
        return storage.download(path)
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"model.path: cannot download {path} at revision {revision}: {reason}") from None


def _link(source: Path, target: Path) -> None:
    """A hard link where the file system allows it, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


if __name__ == "__main__":
    from steps.program import main

    main(prepare)
