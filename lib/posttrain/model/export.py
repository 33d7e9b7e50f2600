"""A Decoder becomes a standard Hugging Face folder that transformers and vLLM open."""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from posttrain.model.decoder import Decoder
from posttrain.model.weights import hf_tensors

NOT_COPIED = ("manifest.json", "model.safetensors.index.json")
"""Files of a model folder that describe its own bytes, not the model."""


def write_weights(folder: str | Path, model: Decoder) -> None:
    """Write model.safetensors under Hugging Face names, the vocabulary trimmed, a tied head left out."""
    target = Path(folder, "model.safetensors")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in hf_tensors(model)}
    save_file(tensors, target, metadata={"format": "pt"})
    shutil.copymode(Path(folder, "config.json"), target)  # safetensors writes 0600; others may read what is published


def write_generation_config(folder: str | Path, *, stop_id: int, pad_id: int) -> None:
    """Tell every engine that opens the folder where a turn ends, beside what it was told already."""
    path = Path(folder, "generation_config.json")
    known = json.loads(path.read_text()) if path.is_file() else {}
    stops = known.get("eos_token_id") or []
    stops = stops if isinstance(stops, list) else [stops]
    stops = [stop_id, *(token for token in stops if token != stop_id)]
    known |= {"eos_token_id": stops if len(stops) > 1 else stop_id, "pad_token_id": pad_id}
    path.write_text(json.dumps(known, indent=2) + "\n")


def export_model(model: Decoder, folder: str | Path, *, like: str | Path) -> None:
    """Write weights beside the config, tokenizer and template files of the folder `like`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for source in sorted(Path(like).iterdir()):
        if source.suffix in (".json", ".jinja", ".txt", ".model") and source.name not in NOT_COPIED:
            shutil.copyfile(source, Path(folder, source.name))
    write_weights(folder, model)
