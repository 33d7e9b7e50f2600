"""What a policy rank trains, and what stands beside it: a folder's model with adapters or a score head, a teacher."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posttrain.compute.weight_sync import Part
from posttrain.data.types import Batch
from posttrain.model.backend import Backend
from posttrain.model.forward import Teacher, forward, loss_index, loss_sum
from posttrain.model.heads import NATIVE, VALUE, HeadSpec
from posttrain.model.lora import LoRA, add_lora, reset_adapters
from posttrain.model.losses import Loss
from posttrain.model.peft_format import adapter_tensors, save_adapter, scaled_tensors
from posttrain.model.weights import hf_name, hf_tensors

Scores = dict[str, np.ndarray]
"""What is known of the trained tokens of a pack, by name: [N] float32 each."""

ADAPTER = "adapter"
"""Folder of a trained model that holds its adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What is made of a model's folder, and what stands beside it; nothing of it by default."""

    lora: LoRA | None = None
    """Adapters that are trained in place of the weights."""
    scores: tuple[str, ...] = ()
    """Outputs of Hugging Face's head `score`, which then stands in the LM head's place: a reward model."""
    heads: Mapping[str, HeadSpec] = field(default_factory=dict)
    """Beside the LM head, the module at the front among them (heads.py)."""
    value_head: bool = False
    """A head `value` beside the LM head: a critic."""
    teacher_uri: str | None = None
    """Folder of a frozen model over the same vocabulary, for losses that read a teacher, and to score samples."""
    seed: int = 0
    """Of new heads and adapters."""


def build_policy(
    backend: Backend,
    folder: Any,
    build: Build,
    *,
    device: torch.device,
    dtype: torch.dtype,
    place: Callable[[Any], None] | None = None,
    trained_dtype: torch.dtype | None = None,
) -> Any:
    """The model to be trained, on `device`.

    Args:
        place: of load_decoder(), for a model that is sharded over a mesh, its adapters with it.
        trained_dtype: of adapters, and of heads beside them; the model's own when None.

    Raises:
        ModelError: the folder, or a target of the adapters, is not what the backend can load or adapt.
    """
    heads: dict[str, Any] = {}
    if build.scores:
        heads = {"heads": {NATIVE: len(build.scores)}, "lm_head": False, "seed": build.seed}
    elif build.value_head:
        heads = {"heads": {VALUE: 1}}
    elif build.heads:
        heads = {"heads": dict(build.heads), "seed": build.seed}
    if build.lora is None:
        return backend.load(folder, device=device, dtype=dtype, **heads, **({"place": place} if place else {}))
    lora = build.lora

    def adapt(model: Any) -> None:
        add_lora(model, lora, seed=build.seed, dtype=trained_dtype)
        for head in getattr(model, "heads", {}).values():
            head.to(trained_dtype).requires_grad_(True)  # drawn at random: trained whole, whatever the adapters are

    def adapt_and_place(model: Any) -> None:
        assert place is not None
        adapt(model)
        place(model)

    if place is None:
        model = backend.load(folder, device=device, dtype=dtype, **heads)
        adapt(model)
        return model
    model = backend.load(folder, device=device, dtype=dtype, **heads, place=adapt_and_place)
    reset_adapters(model)
    return model


def taught_by(teacher: nn.Module) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """loss_sum() with the distributions of a frozen teacher on the same batch, for the losses that read them."""

    def with_teacher(model: Any, batch: Batch, loss_fn: Loss, *, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        seen = _teacher(teacher, batch) if loss_fn.reads == "teacher" else None
        return loss_sum(model, batch, loss_fn, scale=scale, teacher=seen)

    return with_teacher


def write_adapter(model: Any, folder: Path, *, lora: LoRA, base: str) -> None:
    """The adapters alone, in PEFT's format, in a folder below that of the merged model."""
    save_adapter(model, folder / ADAPTER, lora=lora, base=base, hf_names=partial(hf_name, model.config))


def join_adapter(model: Any) -> None:
    """What the other ranks of a sharded model do while rank 0 is in write_adapter(): gather with it."""
    adapter_tensors(model, hf_names=partial(hf_name, model.config))


def sent_tensors(backend: Backend, model: Any, part: Part) -> Iterator[tuple[str, Tensor]]:
    """What generators get of a model, whole tensors one at a time; of a sharded model all ranks go through them."""
    if part == "merged":
        yield from backend.tensors(model)
        return
    if part == "whole":
        yield from hf_tensors(model, merged=False)
    yield from scaled_tensors(model, hf_names=partial(hf_name, model.config))


@torch.no_grad()
def document_logprobs(model: Any, batch: Batch) -> list[float]:
    """[S] log p of the trained tokens of each sample, weighted as the loss weighs them, nats."""
    weighted = (batch.loss_mask * forward(model, batch).logprobs).double()
    sums = weighted.new_zeros(batch.num_samples).index_add(0, batch.doc_id[batch.loss_idx], weighted)
    return sums.tolist()


@torch.no_grad()
def token_logprobs(model: Any, batch: Batch, *, temperature: float) -> Tensor:
    """[N] float32, nats: log p of the targets that carry loss, without gradient."""
    return forward(model, batch, temperature=temperature).logprobs


@torch.no_grad()
def token_values(model: Any, batch: Batch) -> Tensor:
    """[N] float32: what the model's critic expects before each target that carries loss."""
    values = forward(model, batch, with_logprobs=False).values
    assert values is not None, "the model has no value head"
    return values


@torch.no_grad()
def _teacher(teacher: Any, batch: Batch) -> Teacher:
    return Teacher(hidden=teacher(batch)[loss_index(batch)], weight=teacher.output_head.weight)
