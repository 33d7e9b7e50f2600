"""Activation checkpointing of a block: what the forward keeps for the backward, and what the backward makes again."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "selective", "full")
"""none: a block keeps what its backward reads. selective: the matmuls' and the attention's outputs; where the block is
compiled, the half of it that is dearest to make again, as the compiler reckons. full: the block's input alone, for a
third more work."""

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._flash_attention_forward.default,
}


def run_block(block: nn.Module, x: Tensor, *rest: Any, mode: str) -> Tensor:
    """block(x, *rest) under a mode of MODES; a compiled block's `selective` is set when it is compiled."""
    if mode == "none" or not torch.is_grad_enabled():
        return block(x, *rest)
    how: dict[str, Any] = {"context_fn": _selective_contexts} if mode == "selective" else {}
    # No block draws random numbers, so none need to be drawn again.
    return checkpoint(block, x, *rest, use_reentrant=False, preserve_rng_state=False, **how)  # pyright: ignore[reportReturnType]


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
