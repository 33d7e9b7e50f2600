"""The gate between our decoder and the world: the same function as transformers', forward and backward, or an error."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.data.batch import collate
from posttrain.data.sample import shift
from posttrain.data.types import Batch, Pack
from posttrain.errors import ModelError
from posttrain.model.decoder import Decoder
from posttrain.model.load import FROM_FOLDER, load_decoder
from posttrain.model.verify_modules import first_divergence
from posttrain.model.weights import hf_name, to_hf

TOLERANCE = 1e-4
"""Largest absolute difference of float32 logits that still counts as the same model."""

GRADIENT_TOLERANCE = 1e-3
"""Largest difference of a float32 gradient, relative to its norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How near two implementations of a model are."""

    packed: float
    """Largest absolute difference of logits, ours in one flat batch, theirs a document at a time."""
    unpacked: float
    """The same with ours a document at a time."""
    top1: float
    """Share of positions where both hold the same token likeliest."""
    gradient: float | None
    """Largest relative difference of a parameter's gradient; None where it was not compared."""
    module: str | None
    """The first module whose output differs, with its difference; None when the logits agree."""


def compare_with_transformers(
    folder: str | Path, *, seed: int = 0, num_docs: int = 6, gradients: bool = False
) -> dict[str, Any]:
    """agreement(), or an error when it is not close enough.

    Returns:
        max_abs_diff, packed_diff, unpacked_diff and top1_agreement over all positions, and with `gradients`
        gradient_diff.

    Raises:
        ModelError: logits differ by more than TOLERANCE, or a gradient by more than GRADIENT_TOLERANCE;
            names the first module that differs.
    """
    found = agreement(folder, seed=seed, num_docs=num_docs, gradients=gradients)
    worst = max(found.packed, found.unpacked)
    if not worst <= TOLERANCE:
        kind = "packed " if found.unpacked <= TOLERANCE else ""
        where = f"; the first module that differs: {found.module}" if found.module else ""
        raise ModelError(
            f"{folder}: {kind}logits differ from transformers by {worst:.2e}, allowed {TOLERANCE:.0e}{where}"
        )
    if found.gradient is not None and not found.gradient <= GRADIENT_TOLERANCE:
        raise ModelError(
            f"{folder}: logits agree, but a gradient differs from transformers' by {found.gradient:.2e} of its norm, "
            f"allowed {GRADIENT_TOLERANCE:.0e}"
        )
    more = {} if found.gradient is None else {"gradient_diff": found.gradient}
    both = {"packed_diff": found.packed, "unpacked_diff": found.unpacked}
    return {"max_abs_diff": worst, **both, "top1_agreement": found.top1, **more}


def agreement(folder: str | Path, *, seed: int = 0, num_docs: int = 6, gradients: bool = False) -> Agreement:
    """Open `folder` with both implementations and compare them on random documents, float32 on CPU.

    Ours sees the documents packed into one flat batch and one at a time, transformers one at a time, so
    the comparison also proves the document boundaries. The gradient is that of a random projection of
    all logits.
    """
    model, theirs = load_decoder(folder), open_transformers(folder)
    # transformers' embedding of the pad token takes no gradient, and real documents hold none.
    documents = random_documents(model, seed=seed, num_docs=num_docs, without=theirs.config.pad_token_id)
    inputs = [ids[:-1] for ids in documents]
    upstream = _projections(model, inputs, seed=seed) if gradients else None
    packed, ours = _ours(model, batch_of(documents), len(inputs), upstream)
    expected, reference = _theirs(theirs, inputs, upstream)
    alone = [_ours(model, batch_of([ids]), 1, None)[0][0] for ids in documents]
    differences = [_worst(got, want) for got, want in zip(packed, expected, strict=True)]
    unpacked = [_worst(got, want) for got, want in zip(alone, expected, strict=True)]
    same = torch.cat([got.argmax(-1) == want.argmax(-1) for got, want in zip(packed, expected, strict=True)])
    failed = not max(*differences, *unpacked) <= TOLERANCE
    module = first_divergence(model, theirs, batch_of(documents[:1]), tolerance=TOLERANCE) if failed else None
    return Agreement(
        packed=max(differences),
        unpacked=max(unpacked),
        top1=float(same.float().mean()),
        gradient=_gradient_difference(model, ours, reference) if gradients else None,
        module=module,
    )


def open_transformers(folder: str | Path) -> Any:
    """transformers' own model of the folder, float32 on the CPU, its plainest attention."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    kwargs = {"dtype": torch.float32, "attn_implementation": "eager"} | FROM_FOLDER
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def random_documents(model: Decoder, *, seed: int, num_docs: int, without: int | None = None) -> list[list[int]]:
    """Token ids of documents of 2 to 64 tokens, no longer than the model was made for, and without one token."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, min(64, model.config.max_length), num_docs)
    tokens = np.delete(np.arange(model.config.vocab_size), [] if without is None else [without])
    return [rng.choice(tokens, n).tolist() for n in lengths]


def batch_of(documents: list[list[int]]) -> Batch:
    """One flat batch of the documents and a padded tail."""
    samples = tuple(shift(ids, [1.0] * len(ids)) for ids in documents)
    size = sum(len(sample) for sample in samples)
    return collate(Pack(samples=samples, num_units=len(samples)), pack_tokens=size + 7)


def _projections(model: Decoder, inputs: list[list[int]], *, seed: int) -> list[Tensor]:
    """A random weight for every logit, [L, V] a document."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(map(len, inputs))
    return [torch.randn(len(ids), model.config.vocab_size, generator=generator) / total for ids in inputs]


def _ours(
    model: Decoder, batch: Batch, num_docs: int, upstream: list[Tensor] | None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits of every document, and with `upstream` the gradients by our names."""
    assert model.output_head is not None, "logits of a model with an LM head are compared"
    with torch.set_grad_enabled(upstream is not None):
        flat = model.output_head(model(batch))[:, : model.config.vocab_size]
    bounds = batch.cu_seqlens.tolist()[: num_docs + 1]
    logits = [flat[start:end] for start, end in pairwise(bounds)]
    named = dict(model.named_parameters())
    return [each.detach() for each in logits], _gradients(logits, named, upstream)


def _theirs(
    model: Any, inputs: list[list[int]], upstream: list[Tensor] | None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    with torch.set_grad_enabled(upstream is not None):
        logits = [model(torch.tensor([ids])).logits[0].float() for ids in inputs]
    named = dict(model.named_parameters())
    return [each.detach() for each in logits], _gradients(logits, named, upstream)


def _gradients(logits: list[Tensor], named: Mapping[str, Tensor], upstream: list[Tensor] | None) -> dict[str, Tensor]:
    if upstream is None:
        return {}
    loss = torch.stack([(each * weights).sum() for each, weights in zip(logits, upstream, strict=True)]).sum()
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def _gradient_difference(model: Decoder, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference over all parameters, relative to the norm of transformers' gradient."""
    largest = max(float(each.norm()) for each in theirs.values())
    worst = 0.0
    for name, gradient in ours.items():
        # transformers stacks experts in memory as we do, and writes one matrix an expert to disk.
        pairs = dict(to_hf(model.config, name, gradient))
        if not pairs.keys() <= theirs.keys():
            pairs = {hf_name(model.config, name): gradient}
        for their_name, got in pairs.items():
            want = theirs[their_name]
            # A gradient that is zero but for rounding is held against the largest one's rounding.
            worst = max(worst, float((got - want).norm()) / max(float(want.norm()), 1e-3 * largest))
    return worst


def _worst(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max())
