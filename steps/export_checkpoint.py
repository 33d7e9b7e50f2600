"""A committed checkpoint becomes a Hugging Face folder at any time: on a CPU, without the cluster that wrote it."""

from pathlib import Path
from typing import Any

from posttrain import storage
from posttrain.compute.committed import Found, open_checkpoint
from posttrain.compute.shard_file import read_parts
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.errors import CheckpointError
from posttrain.model.backend import backend_of
from posttrain.model.export import write_generation_config

MODEL = "model."


def export_checkpoint(checkpoint: str, out: str, *, model_uri: str | None = None) -> dict[str, Any]:
    """Publish the weights of `checkpoint` (…/checkpoints/STAGE/step_N) as the folder `out`.

    Reads the parameters only, whatever number of ranks wrote them, and proves what it reads.

    Args:
        model_uri: the model that training started from, for its config and tokenizer; None takes the one that the
            checkpoint names.

    Returns:
        uri, step, and what the export counted: weights_sha256, parameters.

    Raises:
        CheckpointError: not committed, damaged, of another model than model_uri, or that model is not there.
    """
    found = open_checkpoint(checkpoint)
    source = _source(found, model_uri)
    backend = backend_of(found.manifest["made_from"]["backend"])
    model = backend.load(source)
    held = {f"{MODEL}{name}": parameter.detach() for name, parameter in model.named_parameters()}
    weights = found.index.only(MODEL)
    weights.check_same(held, where=checkpoint)
    read_parts(found.folder, weights.stored(), held)
    with storage.staging(out) as folder:
        facts = backend.export(model, folder, like=source)
        tokenizer = BaseHFModelTokenizer(source)
        write_generation_config(folder, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id)
        storage.publish(folder, out, **facts, step=found.step, checkpoint=checkpoint)
    return {"uri": out, "step": found.step, **facts}


def _source(found: Found, model_uri: str | None) -> Path:
    """The folder of the model that the checkpoint was trained from; beside the run's checkpoints if it was moved."""
    recorded = found.manifest["made_from"]["model_uri"]
    root = found.uri.rsplit("/", 3)[0]
    moved = storage.join(root, recorded.rstrip("/").rsplit("/", 1)[1])
    for uri in [model_uri] if model_uri else [recorded, moved]:
        if storage.exists(storage.join(uri, "manifest.json")):
            return storage.fetch(uri)
    raise CheckpointError(
        f"{found.uri} was trained from {recorded}, which is not there, nor is {moved}. "
        "Fix: name the model's folder with --model"
    )
