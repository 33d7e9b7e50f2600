"""Where two implementations of one model part: the first module, in the order of the forward pass, that differs."""

from typing import Any

import torch
from torch import Tensor, nn

from posttrain.data.types import Batch
from posttrain.model.decoder import Decoder
from posttrain.model.families import DecoderConfig
from posttrain.model.weights import hf_name

IN_A_BLOCK = (
    "attention_norm",
    "attention.q_norm",
    "attention.k_norm",
    "attention",
    "attention_out_norm",
    "mlp_norm",
    "mlp",
    "mlp_out_norm",
)
"""Modules of a block in the order in which they run."""


@torch.no_grad()
def first_divergence(model: Decoder, theirs: Any, batch: Batch, *, tolerance: float) -> str | None:
    """Run both on the first document of `batch` and compare module by module.

    Returns:
        Our name, theirs and the largest difference of the first module beyond `tolerance`; None when all agree
        and only the head can differ.
    """
    length = int(batch.cu_seqlens[1])
    pairs = _pairs(model.config, model, theirs)
    ours = _outputs({name: module for name, _, module, _ in pairs}, lambda: model(batch))
    ids = batch.input_ids[None, :length]
    reference = _outputs({name: module for _, name, _, module in pairs}, lambda: theirs(ids))
    for our_name, their_name, _, _ in pairs:
        got, want = ours[our_name][:length], reference[their_name]
        if got.shape != want.shape and want.ndim == 3:
            want = want.transpose(0, 1)  # some norm the heads before they move them, some after
        difference = float((got - want).abs().max()) if got.shape == want.shape else float("nan")
        if not difference <= tolerance:
            return f"{our_name} ({their_name}), by {difference:.2e}"
    return None


def _pairs(config: DecoderConfig, model: Decoder, theirs: Any) -> list[tuple[str, str, nn.Module, nn.Module]]:
    """Our name, their name, our module, their module, in the order of the forward pass."""
    names = ["embedding"]
    for layer in range(config.num_layers):
        names += [f"layers.{layer}.{part}" for part in IN_A_BLOCK]
        names.append(f"layers.{layer}")
    names.append("norm")
    ours, reference = dict(model.named_modules()), dict(theirs.named_modules())
    found = []
    for name in names:
        module = ours.get(name)
        if module is not None and not isinstance(module, nn.Identity):
            their_name = _their_name(config, name)
            found.append((name, their_name, module, reference[their_name]))
    return found


def _their_name(config: DecoderConfig, name: str) -> str:
    if name.endswith(("attention", "mlp")):
        return hf_name(config, f"{name}.x").removesuffix(".x")
    if name.startswith("layers.") and name.count(".") == 1:
        return f"model.{name}"
    return hf_name(config, f"{name}.weight").removesuffix(".weight")


def _outputs(modules: dict[str, nn.Module], run: Any) -> dict[str, Tensor]:
    """What each module returned in run(), without a batch dimension."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in modules.items():

        def keep(_module, _args, output, name=name):
            first = output[0] if isinstance(output, tuple) else output
            found[name] = first[0] if first.shape[0] == 1 and first.ndim > 2 else first

        handles.append(module.register_forward_hook(keep))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found
