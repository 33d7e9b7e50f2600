"""Sources and model become folders of the run, published with hashes: the snapshot that everything later reads."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain import storage
from posttrain.config import FreshModel, Origin, RunConfig
from posttrain.data.record_checks import question_hash
from posttrain.data.slices import slices_of
from posttrain.data.source import Source, as_files, read_rows, stored_rows, write_rows
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.train_tokenizer import train_tokenizer
from posttrain.data.types import Row
from posttrain.errors import DataError, ModelError, RowError
from posttrain.manifest import MANIFEST, json_sha256, read_manifest
from posttrain.model.backend import backend_of
from posttrain.model.build import build_model, fresh_config
from posttrain.model.heads import FOLDER as HEADS
from posttrain.plugin import resolve
from posttrain.workflow.measures import check_slices
from steps.model_card import LICENCE_FILES, README
from steps.origin import LINEAGE, locate
from steps.recipes import prompt_sets, rows_of, teacher_of, trains_on_rows
from steps.streams import row_reader, shares_of, store_sources, stored_sources

TEXT_FILES = (".json", ".jinja", ".txt", ".model")
"""What a model's folder holds beside its weights: config, tokenizer, chat template."""

ROW_SETS = ("prompts", "held_out", "questions")
"""Of the rows that are not streamed; a run has those that its recipe reads."""

MESSAGES = ("messages", "prompt", "chosen", "rejected")
"""Columns of a row that hold messages."""

VOCABULARY_ROWS = 100_000
"""Rows of each source that a fresh model's tokenizer is trained on."""


def prepare(config: RunConfig, *, root: str) -> dict[str, Any]:
    """Snapshot prompts and held-out rows, index the training sources, and bring or build the model.

    Returns:
        data: uri, rows per set, sha256 per file, and fingerprint: of the rows alone, equal for the same rows.
        model: uri and architecture.
        teacher_uri: of a run that learns from one, else None.
        parts: shares of tokenising the training sources, [source, first block, end block].

    Raises:
        DataError: a source is empty or malformed, or prompts repeat held-out rows.
        ModelError: the model folder is not one that model.backend can load.
    """
    data_uri, model_uri = storage.join(root, "data"), storage.join(root, "model")
    storage.ensure_folder(data_uri, lambda folder: write_data(config, root=root, folder=folder))
    folder = storage.fetch(data_uri)
    rows = row_sets(folder)
    sources = stored_sources(folder)
    storage.ensure_folder(
        model_uri, lambda target: _write_model(config, target, vocabulary_texts(config, rows, sources))
    )
    shape = backend_of(config.model.backend).shape(storage.fetch(model_uri))
    teacher_uri, teacher = None, teacher_of(config)
    if teacher is not None:
        teacher_uri, student = storage.join(root, "teacher"), storage.fetch(model_uri)
        storage.ensure_folder(teacher_uri, lambda target: _write_teacher(config, teacher, target, student))
    files = read_manifest(folder)["files"]
    return {
        "data": {
            "uri": data_uri,
            "rows": {name: len(found) for name, found in rows.items()},
            "sha256": {name: entry["sha256"] for name, entry in files.items()},
            "fingerprint": rows_fingerprint(folder),
        },
        "model": {"uri": model_uri, "family": shape.family, "hidden_size": shape.hidden_size},
        "teacher_uri": teacher_uri,
        "parts": shares_of(sources) if config.data.tokenize == "ahead" else shares_of([]),
    }


def rows_fingerprint(folder: Path) -> str:
    """sha256 of the rows that a run reads: equal for the same rows, wherever they lie and whenever they were written.

    Args:
        folder: what prepare() published as `data`.
    """
    files = read_manifest(folder)["files"]
    sets = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".parquet")}
    return json_sha256({"sets": sets, "sources": [source.fingerprint for source in stored_sources(folder)]})


def open_sources(config: RunConfig, *, root: str) -> list[Source]:
    """The training sources of the config, indexed; the rows of a function become a file below `root`."""
    if not trains_on_rows(config):
        return []
    return [
        as_files(
            entry.path,
            key=f"data.sources[{number}]",
            seed=config.seed,
            uri=storage.join(root, "rows", f"source_{number:03d}"),
        )
        for number, entry in enumerate(config.data.sources)
    ]


def write_data(config: RunConfig, *, root: str, folder: Path) -> None:
    """Write held-out rows, prompts and questions, and the index of the training sources, into `folder`."""
    kind, seed, slice_by = rows_of(config).held_out, config.seed, config.eval.slice_by
    keep = (*rows_of(config).numbers.ratings, *(() if slice_by is None else (slice_by,)))
    held_out = read_rows(config.data.held_out, key="data.held_out", seed=seed, wanted=kind, keep=keep)
    if slice_by is not None:
        check_slices(config.eval.gate, slice_by, slices_of(held_out, slice_by))  # before anything is tokenised
    write_rows(held_out, folder / "held_out.parquet")
    reserved = frozenset(question_hash(row) for row in held_out) if kind == "prompt" else frozenset()
    for name, (key, source) in prompt_sets(config).items():
        if name != "held_out":
            rows = read_rows(source, key=key, seed=seed, wanted="prompt", held_out=reserved)
            write_rows(rows, folder / f"{name}.parquet")
    store_sources(open_sources(config, root=root), folder)


def row_sets(folder: Path) -> dict[str, list[Row]]:
    """The sets of rows that write_data() wrote, by name."""
    return {name: stored_rows(path) for name in ROW_SETS if (path := folder / f"{name}.parquet").exists()}


def vocabulary_texts(config: RunConfig, rows: dict[str, list[Row]], sources: Sequence[Source]) -> Iterator[str]:
    """What a fresh model's tokenizer learns its vocabulary from. Bad rows are left out here, and counted later."""
    readers = [row_reader(entry, rows_of(config)) for entry in config.data.sources]
    found = [each for name in ("held_out", "prompts", "questions") for each in rows.get(name, ())]
    for source, read in zip(sources, readers, strict=False):
        for _, _, record in islice(source.in_order(), VOCABULARY_ROWS):
            with suppress(RowError):
                found.append(read(record))
    for row in found:
        for message in (each for column in MESSAGES for each in row.get(column, ())):
            yield f"{message['role']}\n{message['content'] or ''}\n"


def write_tokenizer(config: RunConfig, fresh: FreshModel, folder: Path, texts: Iterator[str]) -> int:
    """A fresh model's tokenizer: trained on the texts, or what the user's own function writes; its rows of tokens.

    Raises:
        DataError: what the function wrote is no tokenizer to train with.
    """
    if fresh.tokenizer is None:
        return train_tokenizer(texts, folder, vocab_size=fresh.vocab_size)
    resolve(fresh.tokenizer, key="model.fresh.tokenizer")(folder, config.seed)
    return BaseHFModelTokenizer(folder).max_id + 1


def model_folder(path: str, revision: str | None, *, suffixes: tuple[str, ...], key: str = "model") -> Path:
    """The model's files that end in one of `suffixes` on this machine, downloaded if they are not.

    Raises:
        ModelError: the hub does not give them.
    """
    if storage.is_s3(path):
        return storage.download(path, suffixes=suffixes)
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [f"*{suffix}" for suffix in suffixes]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{key}.path: cannot download {path} at revision {revision}: {reason}") from None


def _write_model(config: RunConfig, folder: Path, texts: Iterator[str]) -> None:
    fresh, origin = config.model.fresh, teacher_of(config)
    if fresh is None:
        _copy_model(config, config.model, folder, "model")
        return
    if origin is not None and origin.path is not None:
        teacher = model_folder(locate(origin.path, config), origin.revision, suffixes=TEXT_FILES)
        size = backend_of("posttrain").shape(teacher).vocab_size
        _copy_text(teacher, folder, but=(LINEAGE,))  # a student writes in its teacher's tokens
    else:
        size = write_tokenizer(config, fresh, folder, texts)
    _build_fresh(config, fresh, folder, vocab_size=size, seed=config.seed)


def _write_teacher(config: RunConfig, teacher: Origin, folder: Path, student: Path) -> None:
    """The teacher of a distillation, over the student's tokens.

    Raises:
        DataError: its tokenizer means another token by an id of the student's.
    """
    if teacher.fresh is not None:
        _copy_text(student, folder, but=(LINEAGE,))
        size = backend_of("posttrain").shape(student).vocab_size
        _build_fresh(config, teacher.fresh, folder, vocab_size=size, seed=config.seed + 1)
        return
    _copy_model(config, teacher, folder, "method.teacher")
    check_same_tokens(student, folder, backend=config.model.backend)


def check_same_tokens(student: Path, teacher: Path, *, backend: str = "posttrain") -> None:
    """Refuse a teacher that speaks of other tokens than the student's. Its matrix may have more rows: padding.

    Raises:
        DataError: names the first ids by which the two tokenizers mean different tokens, or both models' rows.
    """
    mine, theirs = (
        {number: token for token, number in BaseHFModelTokenizer(folder).hf.get_vocab().items()}
        for folder in (student, teacher)
    )
    differ = [number for number in sorted(mine.keys() | theirs.keys()) if mine.get(number) != theirs.get(number)]
    if differ:
        shown = [f"id {n} is {mine.get(n)!r} for the student and {theirs.get(n)!r} for the teacher" for n in differ[:3]]
        raise DataError(
            f"method.teacher: {'; '.join(shown)} ({len(differ)} ids differ); "
            "distillation compares distributions over the same tokens: choose models of one tokenizer"
        )
    rows = [backend_of(backend).shape(folder).vocab_size for folder in (student, teacher)]
    if rows[1] < rows[0]:
        raise DataError(
            f"method.teacher: it has {rows[1]} rows of tokens, the student {rows[0]}; it says nothing of the last "
            f"{rows[0] - rows[1]}: choose a teacher with as many rows or more"
        )


def _build_fresh(config: RunConfig, fresh: FreshModel, folder: Path, *, vocab_size: int, seed: int) -> None:
    shape = fresh.shape | {"vocab_size": vocab_size}
    shape |= {"mlp_size": 4 * fresh.hidden_size, "max_length": config.data.pack_tokens}
    build_model(folder, fresh_config(**shape), seed=seed)


def _copy_text(source: Path, folder: Path, *, but: tuple[str, ...] = ()) -> None:
    for path in sorted(source.iterdir()):
        if path.suffix in TEXT_FILES and path.name not in (MANIFEST, *but):
            shutil.copyfile(path, folder / path.name)


def _copy_model(config: RunConfig, origin: Origin, folder: Path, key: str) -> None:
    assert origin.path is not None, "the config's own check lets exactly one of path and fresh through"
    path = locate(origin.path, config)
    suffixes = (*TEXT_FILES, ".safetensors", README, *LICENCE_FILES)
    source = model_folder(path, origin.revision, suffixes=suffixes, key=key)
    backend_of(config.model.backend).shape(source)
    for path in sorted(source.glob("*.safetensors")):
        _link(path.resolve(), folder / path.name)
    _copy_text(source, folder)
    for name in (README, *LICENCE_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if Path(source, HEADS).is_dir():
        shutil.copytree(source / HEADS, folder / HEADS)
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{key}.path: {origin.path} holds no .safetensors file")


def _link(source: Path, target: Path) -> None:
    """A hard link where the file system allows it, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


if __name__ == "__main__":
    from steps.program import main

    main(prepare)
