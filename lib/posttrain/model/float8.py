"""x W^T with operands in float8, scaled to them as they come (dynamic scaling), where layers.Linear has F.linear.

Only the product is in float8: weights, gradients, optimizer and checkpoints stay what they are. Largest elements are
found by plain operations, which the compiler fuses into what makes the tensor; the matmuls are torch._scaled_mm, which
wants both operands contiguous along the dimension that it sums over. The gradients sum over the other one, so a cast
leaves the transpose too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.errors import ModelError
from posttrain.model import float8_kernels
from posttrain.model.decoder import Decoder
from posttrain.model.families import DecoderConfig
from posttrain.model.lora import linears

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""Elements of a row of float8 that the kernels read at once: sides of a matrix must be multiples of it."""
CAPABILITY = (8, 9)
"""Of the first GPUs whose matmuls take float8."""


def states_of(precision: str) -> str:
    """The precision of weights, gradients and optimizer under a value of optim.precision: float8 is not theirs."""
    return precision.replace("float8", "bfloat16")


def precision_on(device: torch.device, precision: str) -> tuple[str, bool]:
    """What a value of optim.precision is on a device: that of states_of(), and whether blocks multiply in float8.

    Raises:
        ModelError: they should, and the device cannot.
    """
    if precision == "auto":
        return ("bfloat16" if device.type == "cuda" else "float32"), False
    if not precision.startswith("float8"):
        return precision, False
    wanted = "optim.precision: float8 needs a GPU of compute capability 8.9 or higher"
    if device.type != "cuda":
        raise ModelError(f"{wanted}, and this rank has none; set optim.precision: auto")
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ModelError(f"{wanted}; {name} has {found[0]}.{found[1]}; set optim.precision: bfloat16")
    return states_of(precision), True


def unfit(config: DecoderConfig, *, tensor: int = 1) -> list[str]:
    """Why a decoder's blocks, split over so many ranks, cannot multiply in float8: a line a reason."""
    sides = {"hidden size": config.hidden_size}
    sides["query heads"] = config.num_heads * config.head_dim // tensor
    sides["key and value heads"] = config.num_kv_heads * config.head_dim // tensor
    if config.experts is None or not all(config.experts.layers):
        sides["MLP"] = config.mlp_size // tensor
    return [
        f"optim.precision: float8 multiplies matrices whose sides are multiples of {MULTIPLE}, and the model's {what} "
        f"are {side} wide on a rank; set optim.precision: bfloat16"
        for what, side in sides.items()
        if side % MULTIPLE
    ]


def use_float8(model: Decoder, *, tensor: int = 1) -> None:
    """Let every Linear of a decoder's blocks multiply in float8: not a head, a router, experts or an adapter's term.

    Args:
        tensor: ranks that share each matrix.

    Raises:
        ModelError: its matrices do not fit, see unfit().
    """
    if problems := unfit(model.config, tensor=tensor):
        raise ModelError("\n".join(problems))
    for _, linear in linears(model):
        linear.float8 = tensorwise


def tensorwise(x: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """layers.Products in float8, their gradients too: e4m3 forward, e5m2 for gradients of outputs, one scale for x and
    one for all of the weights (arXiv:2209.05433). T is a multiple of 16."""
    trained = torch.is_grad_enabled()
    needs = trained and x.requires_grad, trained and weights[0].requires_grad
    if not any(needs):  # dynamo cannot trace a Function of any number of tensors where none has a gradient
        return _products(x, weights, needs)[0]
    return _Tensorwise.apply(needs, x, *weights)  # pyright: ignore[reportReturnType]


def _products(
    x: Tensor, weights: Sequence[Tensor], needs: tuple[bool, bool]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The products, and what their gradients read: x and W transposed, as far as x or W `needs` one, and scales."""
    wanted, trained = needs
    scale_x, scale_w = scale_of([x], E4M3), scale_of(weights, E4M3)
    x8, x8t = cast([x], scale_x, E4M3, dim=0, layouts=(True, trained))
    w8, w8t = cast(weights, scale_w, E4M3, dim=0, layouts=(True, wanted))
    inverse_x, inverse_w = 1 / scale_x, 1 / scale_w
    y = scaled_mm(x8, w8, inverse_x, inverse_w, dtype=x.dtype, fast=True)
    return y.split([len(weight) for weight in weights], dim=-1), (x8t, w8t, inverse_x, inverse_w)


class _Tensorwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, needs: tuple[bool, bool], x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        outputs, kept = _products(x, weights, needs)
        ctx.sizes = [len(weight) for weight in weights]
        ctx.save_for_backward(*kept)
        return outputs

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x8t, w8t, inverse_x, inverse_w = ctx.saved_tensors
        _, wanted, trained, *_ = ctx.needs_input_grad
        scale, how = scale_of(grads, E5M2), {"dtype": grads[0].dtype, "fast": False}
        g8, g8t = cast(grads, scale, E5M2, dim=1, layouts=(wanted, trained))
        dx = scaled_mm(g8, w8t, 1 / scale, inverse_w, **how) if wanted else None
        dw = scaled_mm(g8t, x8t, 1 / scale, inverse_x, **how).split(ctx.sizes) if trained else [None] * len(grads)
        return None, dx, *dw


def scale_of(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """float32 of no dimension: what all of these are multiplied by to fill the range of `dtype`; NaN if one has NaN."""
    # Rows first: that the compiler fuses into what makes the rows.
    tops = [part.abs().amax(-1).amax() for part in parts]
    top = torch.stack(tops).amax() if len(tops) > 1 else tops[0]
    # A power of two, which rounds nothing itself.
    return torch.exp2(torch.floor(torch.log2(torch.finfo(dtype).max / top.float().clamp(min=SMALLEST))))


SMALLEST = 1e-12
"""A largest element below it counts as it, so that zeros have a finite scale."""


def cast(
    parts: Sequence[Tensor], scale: Tensor, dtype: torch.dtype, *, dim: int, layouts: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Matrices, joined along `dim`, times a scale, in float8: [m, n] and its transpose [n, m], both contiguous.

    Args:
        layouts: which of the two are wanted; the other is empty.
    """
    if parts[0].is_cuda:
        return float8_kernels.cast_float8(list(parts), scale, dtype, dim, *layouts)
    x8 = torch.cat([(part.float() * scale).to(dtype) for part in parts], dim)
    empty = x8.new_empty(0)
    return x8 if layouts[0] else empty, x8.t().contiguous() if layouts[1] else empty


def scaled_mm(a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, *, dtype: torch.dtype, fast: bool) -> Tensor:
    """a [m, k], b [n, k] float8 -> a b^T, divided by the scales that both were cast with."""
    return torch._scaled_mm(a, b.t(), inverse_a, inverse_b, out_dtype=dtype, use_fast_accum=fast)
