"""The trained weights become a Hugging Face folder that is proved to be the model that was trained."""

import json
import shutil
from pathlib import Path
from typing import Any

from posttrain import storage
from posttrain.config import RunConfig
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.errors import DataError
from posttrain.manifest import json_sha256
from posttrain.model.backend import backend_of
from posttrain.model.export import write_generation_config
from posttrain.workflow.policy_model import ADAPTER
from steps.model_card import LICENCE_FILES, README, model_card
from steps.origin import LINEAGE, read_lineage
from steps.prepare import rows_fingerprint
from steps.recipes import teacher_of


def export(
    config: RunConfig,
    *,
    root: str,
    model_uri: str,
    provenance: dict[str, Any],
    evaluation: dict[str, Any],
    tokenizer_sha256: str,
    trained: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write config, weights, tokenizer, template and model card; open them with transformers and compare.

    A model of posttrain's own is compared by its logits or scores, one of transformers' by its weights, bit by bit.
    Adapters lie merged in the weights, and in PEFT's format in a folder of their own.

    Args:
        trained: what the training step returned; its ledger is a part of the lineage.

    Returns:
        uri of the folder, the largest logit difference, and what else the backend compared.

    Raises:
        ModelError: what transformers opens is not the model that was trained.
        DataError: the exported tokenizer is not the one that was trained with.
    """
    uri = storage.join(root, "export")
    source, backend = storage.fetch(model_uri), backend_of(config.model.backend)

    def write(folder):
        facts = write_model(config, source, folder)
        runs = [*read_lineage(source), _this_run(config, root, provenance, tokenizer_sha256, trained or {})]
        (folder / LINEAGE).write_text(json.dumps(runs, indent=2) + "\n")
        card = model_card(config, root, provenance=provenance, evaluation=evaluation, runs=runs)
        (folder / README).write_text(card)
        for name in LICENCE_FILES:
            if storage.exists(file := storage.join(root, "model", name)):
                (folder / name).write_bytes(storage.read_bytes(file))
        return facts

    storage.ensure_folder(uri, write)
    folder = storage.fetch(uri)
    checked = backend.verify(folder, source)
    fingerprint = BaseHFModelTokenizer(folder).fingerprint()
    if fingerprint != tokenizer_sha256:
        raise DataError(f"{uri}: tokenizer {fingerprint[:12]} is not the one trained with, {tokenizer_sha256[:12]}")
    return {"uri": uri, **checked, "tokenizer_sha256": fingerprint}


def exported_facts(uri: str) -> dict[str, Any]:
    """What an exported folder says of itself: its files with bytes and sha256, and the runs that made it."""
    lineage = json.loads(storage.read_bytes(storage.join(uri, LINEAGE)))
    return {"files": storage.manifest_of(uri)["files"], "lineage": lineage}


def write_model(config: RunConfig, source: Path, folder: Path) -> dict[str, Any]:
    """Write what a loader opens: config, weights, tokenizer, template, which tokens end a turn, and the adapters.

    The same bytes from the same `source` each time: the step evaluate puts to lm-eval what export() will publish.

    Returns:
        Facts for a manifest: those of the backend, and tokenizer_sha256.
    """
    backend, tokenizer = backend_of(config.model.backend), BaseHFModelTokenizer(source)
    facts = backend.export(backend.load(source), folder, like=source)
    write_generation_config(folder, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id)
    if (source / ADAPTER).is_dir():
        shutil.copytree(source / ADAPTER, folder / ADAPTER)
    return facts | {"tokenizer_sha256": tokenizer.fingerprint()}


def _this_run(
    config: RunConfig, root: str, provenance: dict[str, Any], tokenizer_sha256: str, trained: dict[str, Any]
) -> dict[str, Any]:
    """One entry of the lineage: what this run started from, read and trained, and where that lies."""
    data_uri = storage.join(root, "data")
    tokens_uri = trained.get("tokens_uri") or storage.join(root, "tokens", "all")
    started_from = {"model": config.model.path or "fresh"}
    if (teacher := teacher_of(config)) is not None:
        started_from["teacher"] = teacher.path or "fresh"
    if config.reward is not None and config.reward.model is not None:
        started_from["judge"] = config.reward.model
    return {
        "run": f"{provenance['flow']}/{provenance['run_id']}",
        "method": config.method.name,
        "started_from": ", ".join(f"{name} {path}" for name, path in started_from.items()),
        "config_sha256": provenance["config_sha256"],
        "data_uri": data_uri,
        "data_sha256": json_sha256(storage.manifest_of(data_uri)["files"]),
        "data_fingerprint": rows_fingerprint(storage.fetch(data_uri)),
        "tokens_uri": tokens_uri,
        "tokens_sha256": json_sha256(storage.manifest_of(tokens_uri)["files"]),
        "tokenizer_sha256": tokenizer_sha256,
        "ledger": trained.get("ledger", {}).get("digest"),
    }


if __name__ == "__main__":
    from steps.program import main

    main(export)
