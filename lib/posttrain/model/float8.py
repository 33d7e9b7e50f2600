"""x W^T with operands in float8, scaled to them as they come (dynamic scaling), where layers.Linear has F.linear.

Only the product is in float8: weights, gradients, optimizer and checkpoints stay what they are. A block's casts are
plain operations, which the compiler fuses into what makes their inputs; the matmuls are torch._scaled_mm, which wants
both operands contiguous along the dimension that it sums over.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from posttrain.errors import ModelError
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


def use_float8(model: Decoder, *, tensor: int = 1, recipe: str = "rowwise") -> None:
    """Let every Linear of a decoder's blocks multiply in float8: not a head, a router, experts or an adapter's term.

    Args:
        tensor: ranks that share each matrix.
        recipe: a name of RECIPES.

    Raises:
        ModelError: its matrices do not fit, see unfit().
    """
    if problems := unfit(model.config, tensor=tensor):
        raise ModelError("\n".join(problems))
    for _, linear in linears(model):
        linear.matmul = RECIPES[recipe]


def rowwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in], weight [out, in] bfloat16 -> x W^T (+ b) [T, out]: forward and gradient of x in float8, with a scale
    for each row and column; the gradient of W, a sum over all tokens, in bfloat16."""
    y: Tensor = _Rowwise.apply(x, weight)  # pyright: ignore[reportAssignmentType]
    return y if bias is None else y + bias


def tensorwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As rowwise(), with one scale a tensor and all three matmuls in float8; T is a multiple of 16."""
    trained = torch.is_grad_enabled()
    needs = (trained and x.requires_grad, trained and weight.requires_grad)
    y: Tensor = _Tensorwise.apply(x, weight, *needs)  # pyright: ignore[reportAssignmentType]
    return y if bias is None else y + bias


RECIPES: dict[str, Callable[..., Tensor]] = {"rowwise": rowwise, "tensorwise": tensorwise}


class _Rowwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _rowwise_mm(x, weight)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, weight = ctx.saved_tensors
        (grad,) = grads
        wanted, trained = ctx.needs_input_grad
        dx = _rowwise_mm(grad, weight.t()) if wanted else None
        return dx, grad.t() @ x if trained else None


def _rowwise_mm(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k], b [n, k] -> a b^T [m, n], a scale for each row of both."""
    scale_a, scale_b = scale_of(a, E4M3, dim=1), scale_of(b, E4M3, dim=1)
    a8, b8 = (a.float() * scale_a).to(E4M3).contiguous(), (b.float() * scale_b).to(E4M3).contiguous()
    return scaled_mm(a8, b8, 1 / scale_a, 1 / scale_b, dtype=a.dtype, fast=True)


class _Tensorwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, wanted: bool, trained: bool) -> Tensor:
        scale_x, scale_w = scale_of(x, E4M3), scale_of(weight, E4M3)
        x8, x8t = cast(x, scale_x, E4M3, rows=True, columns=trained)
        w8, w8t = cast(weight, scale_w, E4M3, rows=True, columns=wanted)
        inverse_x, inverse_w = 1 / scale_x, 1 / scale_w
        ctx.save_for_backward(x8t, w8t, inverse_x, inverse_w)
        return scaled_mm(x8, w8, inverse_x, inverse_w, dtype=x.dtype, fast=True)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x8t, w8t, inverse_x, inverse_w = ctx.saved_tensors
        (grad,) = grads
        wanted, trained, *_ = ctx.needs_input_grad
        scale = scale_of(grad, E5M2)
        inverse = 1 / scale
        g8, g8t = cast(grad, scale, E5M2, rows=wanted, columns=trained)
        dx = scaled_mm(g8, w8t, inverse, inverse_w, dtype=grad.dtype, fast=FAST_BACKWARD) if wanted else None
        dw = scaled_mm(g8t, x8t, inverse, inverse_x, dtype=grad.dtype, fast=FAST_BACKWARD) if trained else None
        return dx, dw, None, None


FAST_BACKWARD = False
"""Sum the backward's products in the tensor cores' short accumulators: faster, and less exact over many tokens."""


def scale_of(x: Tensor, dtype: torch.dtype, *, dim: int | None = None) -> Tensor:
    """float32: what x is multiplied by to fill the range of `dtype`, a power of two, so that it rounds nothing; of
    each slice along `dim`, kept with size 1, or, with None, of all (0-d). NaN where x has one."""
    top = x.abs().amax(-1) if dim is None else x.abs().amax(dim, keepdim=True)
    top = top.amax() if dim is None else top  # rows first: that the compiler fuses into what makes the rows
    return torch.exp2(torch.floor(torch.log2(torch.finfo(dtype).max / top.float().clamp(min=SMALLEST))))


SMALLEST = 1e-12
"""A largest element below it is taken for it, so that a tensor of zeros has a finite scale."""


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype, *, rows: bool, columns: bool) -> tuple[Tensor, Tensor]:
    """x [m, n] in float8, and its transpose [n, m], both contiguous; one that is not wanted is empty."""
    if x.is_cuda and KERNEL:
        return _cast(x, scale, dtype, rows, columns)
    x8, empty = (x.float() * scale).to(dtype), x.new_empty(0, dtype=dtype)
    return x8 if rows else empty, x8.t().contiguous() if columns else empty


KERNEL = True
"""Read a tensor once for both layouts, by a kernel of our own."""


@torch.library.custom_op("posttrain::cast_float8", mutates_args=())
def _cast(x: Tensor, scale: Tensor, dtype: torch.dtype, rows: bool, columns: bool) -> tuple[Tensor, Tensor]:
    from posttrain.model.float8_kernels import TILE_COLUMNS, TILE_ROWS, cast_tile

    x = x.contiguous()
    m, n = x.shape
    outputs = _outputs(x, dtype, rows, columns)
    grid = (-(-m // TILE_ROWS.value), -(-n // TILE_COLUMNS.value))
    cast_tile[grid](x, scale, *outputs, m, n, rows, columns)
    return outputs


@_cast.register_fake
def _(x, scale, dtype, rows, columns):
    return _outputs(x, dtype, rows, columns)


def _outputs(x: Tensor, dtype: torch.dtype, rows: bool, columns: bool) -> tuple[Tensor, Tensor]:
    m, n = x.shape
    return x.new_empty((m, n) if rows else 0, dtype=dtype), x.new_empty((n, m) if columns else 0, dtype=dtype)


def scaled_mm(a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, *, dtype: torch.dtype, fast: bool) -> Tensor:
    """a [m, k], b [n, k] float8 -> a b^T, divided by the scales that both were cast with."""
    inverse_b = inverse_b.t() if inverse_b.ndim else inverse_b
    return torch._scaled_mm(a, b.t(), inverse_a, inverse_b, out_dtype=dtype, use_fast_accum=fast)
