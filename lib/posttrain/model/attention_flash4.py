"""The kernels of FlashAttention-4 for Hopper and Blackwell, called as attention_flash.py calls torch's own.

They know documents and windows; sinks are folded in by the caller. The first call of a head size or kind of window
compiles for some seconds; numbers of documents and of tokens compile nothing. Source: the package `flash-attn-4`
(flash_attn/cute/interface.py, `_flash_attn_fwd` and `_flash_attn_bwd`, 4.0.0b36), which has no custom op of torch
that names its window as a number, so that it is called inside ours.
"""

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

CAPABILITIES = (9, 10)
"""Major compute capabilities that it has both directions for."""


def has_flash4(device: torch.device) -> bool:
    """Whether the package is installed and made for this device. Imports nothing."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in CAPABILITIES:
        return False
    return _installed()


def flash4_forward(q: Tensor, k: Tensor, v: Tensor, documents: dict[str, Any], *, left: int, scale: float) -> Any:
    """out [T, H, head_dim] and lse [H, T] float32; `documents` as `bounds` makes them, left -1 for no window."""
    from flash_attn.cute.interface import _flash_attn_fwd  # pyright: ignore[reportMissingImports]

    out, lse, *_ = _flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True, **_masked(left), **documents)
    return out, lse


def flash4_backward(  # noqa: PLR0913 (what the kernel takes)
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: dict[str, Any],
    *,
    left: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; to the same bits each time where torch.use_deterministic_algorithms asks for it."""
    from flash_attn.cute.interface import _flash_attn_bwd  # pyright: ignore[reportMissingImports]

    same = torch.are_deterministic_algorithms_enabled()
    how = {"softmax_scale": scale, "deterministic": same, **_masked(left), **documents}
    dq, dk, dv, *_ = _flash_attn_bwd(q, k, v, out, grad, lse.contiguous(), **how)
    return dq, dk, dv


def bounds(cu_q: Tensor, cu_k: Tensor, longest: int) -> dict[str, Any]:
    """Where documents begin, [D+1] int32 each, in the kernels' words."""
    most = {"max_seqlen_q": longest, "max_seqlen_k": longest}
    return {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, **most}


def _masked(left: int) -> dict[str, Any]:
    return {"causal": True, "window_size_left": None if left < 0 else left, "window_size_right": None}


@cache
def _installed() -> bool:
    try:
        version("flash-attn-4")
    except PackageNotFoundError:
        return False
    return True
