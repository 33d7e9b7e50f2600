"""Score heads: what a model says of a whole document, beside its next tokens or in their place.

A head maps the hidden state of a document's last token to k numbers: a reward (k = 1), the logits of k classes,
one of several tasks. A model may have several under names of their own, and a user's own module among them.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from posttrain import storage
from posttrain.errors import ModelError
from posttrain.model.collectives import fill, full
from posttrain.model.families import DecoderConfig
from posttrain.model.layers import Linear
from posttrain.model.tensor_file import open_tensor_files
from posttrain.plugin import resolve

FOLDER, FILE = "heads", "model.safetensors"
"""Where a model folder keeps the heads that Hugging Face's classes do not have."""

CONFIG_KEY = "posttrain_heads"
"""What config.json says of them."""

VALUE = "value"
"""The one head that is read before every token that carries loss, not at a document's end: a critic."""

SIDE = "side"
"""The one that is read before the blocks: a user's module, called with batch.features [T, F], whose [T, hidden_size] is
added to the token embeddings. Its attribute `features` names what it reads."""

HeadSpec = int | str
"""Outputs of a linear head without bias, or `package.module:name`, called with the hidden size, of a user's own."""

NATIVE = "score"
"""The one head that Hugging Face's ...ForSequenceClassification classes have, a tensor of the model itself."""


def make_head(spec: HeadSpec, hidden_size: int, *, name: str) -> nn.Module:
    """A head over [S, hidden_size]; a linear one is uninitialised.

    Raises:
        ConfigError: an import path that names nothing.
        ModelError: what it names makes no torch module.
    """
    if isinstance(spec, int):
        return Linear(hidden_size, spec)
    head = resolve(spec, key=f"head {name}")(hidden_size)
    if not isinstance(head, nn.Module):
        raise ModelError(f"head {name}: {spec} returned {type(head).__name__}; it must return a torch.nn.Module")
    return head


def with_heads(config: DecoderConfig, heads: Mapping[str, HeadSpec], *, lm_head: bool) -> DecoderConfig:
    """The same model with more heads, or without its LM head.

    Raises:
        ModelError: no LM head, and no linear head `score` in its place.
    """
    merged = replace(config, heads=config.heads | dict(heads), lm_head=config.lm_head and lm_head)
    if not merged.lm_head and not isinstance(merged.heads.get(NATIVE), int):
        raise ModelError(f"a model without an LM head needs a linear head {NATIVE!r}; its heads: {list(merged.heads)}")
    return merged


@torch.no_grad()
def read_heads(model: nn.Module, folder: str | Path, wanted: Mapping[str, HeadSpec], *, seed: int) -> None:
    """Fill the heads that the model's own safetensors do not hold: from `folder`/heads, or drawn where it has none.

    Raises:
        ModelError: the stored head has other tensors than the model's.
    """
    where = storage.join(str(folder), FOLDER)
    stored = open_tensor_files(where) if storage.exists(storage.join(where, FILE)) else {}
    for name, spec in wanted.items():
        head = model.get_submodule(f"heads.{name}")
        names = {f"{name}.{key}": tensor for key, tensor in head.state_dict().items()}
        if not any(key.startswith(f"{name}.") for key in stored):
            draw_head(head, spec, model.config.hidden_size, name=name, seed=seed)  # pyright: ignore
            continue
        found = {key: tuple(file.shapes[key]) for key, file in stored.items() if key.startswith(f"{name}.")}
        expected = {key: tuple(tensor.shape) for key, tensor in names.items()}
        if found != expected:
            raise ModelError(f"{where}: head {name} holds {found}, the model expects {expected}")
        for key, tensor in names.items():
            fill(tensor, stored[key].read(key))


def write_heads(model: nn.Module, folder: str | Path | None) -> dict[str, HeadSpec]:
    """Write every head but Hugging Face's own into `folder`/heads; a folder below, as engines read all beside a model.

    Args:
        folder: None on a rank that only gathers with the one that writes.

    Returns:
        What config.json says of them.
    """
    config: DecoderConfig = model.config  # pyright: ignore[reportAssignmentType]
    own = {name: spec for name, spec in config.heads.items() if config.lm_head or name != NATIVE}
    if own:
        tensors = {
            f"{name}.{key}": full(tensor.detach()).cpu().contiguous()
            for name in own
            for key, tensor in model.get_submodule(f"heads.{name}").state_dict().items()
        }
        if folder is None:
            return own
        Path(folder, FOLDER).mkdir(exist_ok=True)
        save_file(tensors, Path(folder, FOLDER, FILE), metadata={"format": "pt"})
        shutil.copymode(Path(folder, "config.json"), Path(folder, FOLDER, FILE))
    return own


def name_outputs(folder: str | Path, names: Sequence[str]) -> None:
    """Say in config.json what the outputs of the head `score` are, where Hugging Face keeps the names of classes."""
    path = Path(folder, "config.json")
    config = json.loads(path.read_text())
    config["id2label"] = {str(number): name for number, name in enumerate(names)}
    config["label2id"] = {name: number for number, name in enumerate(names)}
    path.write_text(json.dumps(config, indent=2) + "\n")


def output_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a config.json that name_outputs() wrote, in order."""
    labels = config.get("id2label") or {}
    return tuple(labels[number] for number in sorted(labels, key=int))


@torch.no_grad()
def draw_head(head: nn.Module, spec: HeadSpec, hidden_size: int, *, name: str, seed: int) -> None:
    """Give a head that no checkpoint holds its first values: a linear one normal with variance
    1 / (hidden_size + 1) (arXiv:1909.08593, section 2.1), a critic zero, so that its first advantages are the
    rewards alone, a user's own what it draws itself."""
    if name == VALUE:
        assert isinstance(head, Linear), f"head {VALUE} is linear"
        fill(head.weight, torch.zeros(head.weight.shape))
        return
    if isinstance(spec, int):
        generator = torch.Generator().manual_seed(seed)
        assert isinstance(head, Linear)
        values = torch.randn(head.weight.shape, generator=generator) * (hidden_size + 1) ** -0.5
        fill(head.weight, values)
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("cpu"):
            drawn = make_head(spec, hidden_size, name=name).state_dict()
    for key, tensor in head.state_dict().items():
        fill(tensor, drawn[key])
