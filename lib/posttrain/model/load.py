"""A Hugging Face folder becomes a Decoder."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from posttrain.errors import ModelError
from posttrain.model.decoder import Decoder
from posttrain.model.families import decoder_config
from posttrain.model.weights import check_names, hf_tensors


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        ModelError: the file is missing or is no JSON, or it asks for code from the folder.
    """
    path = Path(folder, "config.json")
    if not path.is_file():
        raise ModelError(f"{path} does not exist; model.path must be a Hugging Face model folder")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if "auto_map" in config:
        raise ModelError(f"{path} asks to run code from the folder (auto_map); remove it or use a defined architecture")
    return config


def load_decoder(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Decoder:
    """Build the decoder that config.json names and fill it from the folder's safetensors.

    Names and shapes are checked against the headers before any tensor is read. Rows that
    pad the vocabulary are zero.

    Raises:
        ModelError: unknown architecture, missing, extra or misshapen tensors, damaged file.
    """
    with torch.device("meta"):
        model = Decoder(decoder_config(read_config(folder)))
    targets = dict(hf_tensors(model))
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no .safetensors file")
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ModelError(f"{file} is damaged: {error}") from None
    if model.config.tied_embeddings:
        found.pop("lm_head.weight", None)  # some exports write the tied head a second time
    check_names(found, {name: tuple(t.shape) for name, t in targets.items()}, where=str(folder))
    model = model.to_empty(device=device).to(dtype)
    model.tie()
    with torch.no_grad():
        for weight in {id(w): w for w in (model.embedding.weight, model.output_head.weight)}.values():
            weight[model.config.vocab_size :].zero_()
        targets = dict(hf_tensors(model))
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if name in targets:
                        targets[name].copy_(tensors.get_tensor(name))
    return model
