"""What `model.backend` chooses: how a folder becomes a model, and a model a folder; everything else is shared."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from posttrain.errors import ModelError
from posttrain.model.export import export_model
from posttrain.model.fallback import export_native, load_native, native_config, native_tensors, verify_native
from posttrain.model.families import decoder_config
from posttrain.model.load import load_decoder, read_config
from posttrain.model.verify import compare_with_transformers
from posttrain.model.verify_scores import compare_scores
from posttrain.model.weights import hf_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A definition of models, as functions. The model that `load` returns fits forward() and loss_sum()."""

    shape: Callable[[str | Path], Any]
    """(folder) -> config with family, vocab_size, hidden_size, max_length; refuses what `load` would."""
    load: Callable[..., Any]
    """(folder, device=, dtype=) -> model."""
    tensors: Callable[[Any], Iterator[tuple[str, Tensor]]]
    """(model) -> weights under the names of its checkpoint."""
    export: Callable[..., dict[str, Any]]
    """(model, folder, like=) -> facts; writes a Hugging Face folder."""
    verify: Callable[[str | Path, str | Path], dict[str, Any]]
    """(exported folder, folder that it was made from) -> max_abs_diff, top1_agreement and more."""


def backend_of(name: str) -> Backend:
    """The backend that the config names.

    Raises:
        ModelError: there is none of that name.
    """
    match name:
        case "posttrain":
            return Backend(
                shape=lambda folder: decoder_config(read_config(folder)),
                load=load_decoder,
                tensors=hf_tensors,
                export=export_model,
                verify=lambda folder, _: _compare(folder),
            )
        case "transformers":
            return Backend(
                shape=native_config,
                load=load_native,
                tensors=native_tensors,
                export=export_native,
                verify=verify_native,
            )
        case _:
            raise ModelError(f"model.backend: {name!r} is none. Fix: set posttrain or transformers")


def _compare(folder: str | Path) -> dict[str, Any]:
    scores_only = not decoder_config(read_config(folder)).lm_head
    return compare_scores(folder) if scores_only else compare_with_transformers(folder)
