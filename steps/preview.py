"""What a config would train on, before anything runs: `posttrain preview CONFIG`. Reads no weights, starts no Ray."""

import tempfile
from pathlib import Path
from typing import Any

from posttrain.config import RunConfig
from posttrain.data.prompts import tokenize_prompts
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.types import Row
from posttrain.errors import ConfigError
from posttrain.model.backend import backend_of
from steps.data_report import first_window_report, prompt_report, source_report
from steps.origin import locate
from steps.plan import unresolved_plugins
from steps.prepare import TEXT_FILES, model_folder, row_sets, vocabulary_texts, write_data, write_tokenizer
from steps.recipes import prompt_sets
from steps.streams import PROVED_ROWS, make_encoder, pack_stream, record_units, reserved_hashes, stored_sources


def preview(config: RunConfig) -> dict[str, Any]:
    """The data report of the first window, as the tokenize steps would write it for tokenising online.

    Raises:
        ConfigError: the name of a reward or of other code of the user's leads nowhere.
        DataError: a source cannot be read, or a row of the first window is refused.
    """
    if problems := unresolved_plugins(config):
        raise ConfigError("\n".join(problems))
    with tempfile.TemporaryDirectory(prefix="posttrain-") as name:
        root = Path(name)
        (root / "data").mkdir()
        write_data(config, root=name, folder=root / "data")
        return _report(config, root, row_sets(root / "data"))


def _report(config: RunConfig, root: Path, rows: dict[str, list[Row]]) -> dict[str, Any]:
    sources = stored_sources(root / "data")
    if config.model.fresh:
        folder, shape = root / "model", None
        folder.mkdir()
        texts = vocabulary_texts(config, rows, sources)
        write_tokenizer(config, config.model.fresh, folder, texts)
    else:
        assert config.model.path is not None, "the config's own check lets exactly one of path and fresh through"
        folder = model_folder(locate(config.model.path, config), config.model.revision, suffixes=TEXT_FILES)
        shape = backend_of(config.model.backend).shape(folder)
    tokenizer = BaseHFModelTokenizer(folder)
    encoder = make_encoder(config, tokenizer, shape, prove=PROVED_ROWS)
    units = record_units(config, sources, encoder, reserved=reserved_hashes(root / "data"))
    stream = pack_stream(config, units, sources) if sources else None
    described = [source_report(entry, source) for entry, source in zip(config.data.sources, sources, strict=False)]
    limit = config.data.max_prompt_tokens
    prompts = {
        name: prompt_report(tokenize_prompts(rows[name], tokenizer, key=key, max_prompt_tokens=limit))
        for name, (key, _) in prompt_sets(config).items()
    }
    return {
        "scope": "the first 1,024 draws",
        "tokenizer_sha256": tokenizer.fingerprint(),
        "pack_tokens": config.data.pack_tokens,
        "prompts": prompts,
        **first_window_report(stream, described, encoder),
    }
