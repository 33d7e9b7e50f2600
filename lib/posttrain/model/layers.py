"""The small modules every decoder is made of: Linear, RMSNorm, MLP."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posttrain.model.collectives import Group, copy_in, local, reduce_out

Products = Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]]
"""(x [T, in], [W [out, in], ...]) -> [x W^T [T, out], ...]."""


class Linear(nn.Module):
    """y = x W^T (+ b) over [T, in] -> [T, out], and the low-rank term of its adapter, if any (model/lora.py)."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.float8: Products | None = None
        """Makes x W^T in the place of F.linear (model/float8.py)."""
        self.adapter: nn.Module | None = None
        """Called as adapter(x, x W^T, W); returns what stands in for x W^T, before the bias."""
        self.sum_over: Group | None = None
        """Ranks whose outputs, of a slice of x and of W's columns each, are summed (model/parallel.py)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = local(self.weight)
        if self.float8 is not None:
            return self.adapt(x, *self.float8(x, [weight]))
        if self.adapter is None and self.sum_over is None:
            return F.linear(x, weight, None if self.bias is None else local(self.bias))
        return self.adapt(x, F.linear(x, weight))

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """x W^T becomes the output: the adapter's term where there is one, the other ranks' parts, then the bias."""
        y = y if self.adapter is None else self.adapter(x, y, local(self.weight))
        y = reduce_out(y, self.sum_over)
        return y if self.bias is None else y + local(self.bias)


class Embedding(nn.Embedding):
    """A row a token, times a factor that is rounded to the weights' dtype first, as Gemma's sqrt(hidden) is."""

    def __init__(self, rows: int, size: int, *, scale: float = 1.0):
        super().__init__(rows, size, _weight=torch.empty(rows, size))
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        x = super().forward(input)
        return x if self.scale == 1.0 else x * torch.full((), self.scale, dtype=x.dtype, device=x.device)


def joint(x: Tensor, linears: Sequence[Linear]) -> tuple[Tensor, ...]:
    """Every linear of the same x: [T, in] -> [T, out] each; stacked on a GPU, where narrow matmuls leave cores idle."""
    return stacked(x, linears) if x.is_cuda else tuple(each(x) for each in linears)


def stacked(x: Tensor, linears: Sequence[Linear]) -> tuple[Tensor, ...]:
    """joint() as one matmul over the stacked weights: each is copied once, and their gradients are views of one."""
    weights = [local(each.weight) for each in linears]
    if linears[0].float8 is not None:
        outputs = linears[0].float8(x, weights)
        return tuple(each.adapt(x, y) for each, y in zip(linears, outputs, strict=True))
    biases = [local(each.bias) for each in linears if each.bias is not None]
    assert len(biases) in (0, len(linears)), "linears of one input all have biases or none"
    adapted = any(each.adapter is not None for each in linears)
    bias = torch.cat(biases) if biases and not adapted else None
    outputs = F.linear(x, torch.cat(weights), bias).split([len(weight) for weight in weights], dim=-1)
    return tuple(each.adapt(x, y) for each, y in zip(linears, outputs, strict=True)) if adapted else outputs


class RMSNorm(nn.Module):
    """x / rms(x) in float32, times the weight; families differ in when they cast back, and Gemma stores weight - 1.

    cast_first: weight * cast(normed), as Llama and Qwen; otherwise cast((offset + weight) * normed), as
    GPT-OSS (offset 0) and Gemma (offset 1). In float32 the order makes no difference, in bfloat16 it does.
    """

    def __init__(self, size: int, eps: float, *, cast_first: bool = True, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.cast_first, self.offset = eps, cast_first, offset
        self.partial = False
        """Each rank norms heads of its own with the one weight, whose gradient is their sum (model/parallel.py)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = local(self.weight, partial=self.partial)
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        if self.cast_first:
            return weight.to(x.dtype) * normed.to(x.dtype)
        return ((weight.float() + self.offset) * normed).to(x.dtype)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_pytorch_tanh": _gelu_tanh}
"""Hugging Face's `hidden_act` -> the function; a config with another is refused."""


class MLP(nn.Module):
    """Gated MLP: down(activation(gate(x)) * up(x)) (SwiGLU, arXiv:2002.05202, and Gemma's with tanh-GELU)."""

    def __init__(self, hidden_size: int, mlp_size: int, *, activation: str, bias: bool = False):
        super().__init__()
        self.gate_proj = Linear(hidden_size, mlp_size, bias=bias)
        self.up_proj = Linear(hidden_size, mlp_size, bias=bias)
        self.down_proj = Linear(mlp_size, hidden_size, bias=bias)
        self.activation = ACTIVATIONS[activation]
        self.tensor: Group | None = None

    def forward(self, x: Tensor) -> Tensor:
        # Not joint(): two matmuls this wide fill a GPU by themselves, and the gradients need no tensor of both. One in
        # float8 all the same, so that x is cast once.
        x = copy_in(x, self.tensor)
        if self.gate_proj.float8 is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = stacked(x, (self.gate_proj, self.up_proj))
        return self.down_proj(self.activation(gate) * up)
