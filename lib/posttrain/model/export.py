"""A Decoder becomes a standard Hugging Face folder that transformers and vLLM open."""

import shutil
from pathlib import Path

from safetensors.torch import save_file

from posttrain.model.decoder import Decoder
from posttrain.model.weights import hf_tensors

NOT_COPIED = ("manifest.json", "model.safetensors.index.json")
"""Files of a model folder that describe its own bytes, not the model."""


def write_weights(folder: str | Path, model: Decoder) -> None:
    """Write model.safetensors under Hugging Face names, the vocabulary trimmed, a tied head left out."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in hf_tensors(model)}
    save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})


def export_model(model: Decoder, folder: str | Path, *, like: str | Path) -> None:
    """Write weights beside the config, tokenizer and template files of the folder `like`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for source in sorted(Path(like).iterdir()):
        if source.suffix in (".json", ".jinja", ".txt", ".model") and source.name not in NOT_COPIED:
            shutil.copyfile(source, Path(folder, source.name))
    write_weights(folder, model)
