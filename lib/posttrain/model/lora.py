"""Low-rank adapters: which Linears get one, what it computes, and how it is merged or left out.

A model enters, and leaves with an Adapter inside every Linear that a target names; everything else is frozen.
The adapter sits in `Linear.adapter`, so that sharding, compiling and exporting see the modules they always see.
"""

import difflib
import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posttrain.errors import ModelError
from posttrain.model.collectives import fill, full, local
from posttrain.model.layers import Linear

ALL_LINEAR = "all-linear"
"""The target that names every Linear but the heads."""

HEADS = ("output_head", "heads")
"""Modules that hold no Linear to adapt: the output head is applied by its weight alone, scores are trained whole."""


@dataclass(frozen=True)
class LoRA:
    """What the adapters of a model are (LoRA, arXiv:2106.09685); a value that makes none of them is a ModelError."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of Linears: a last component, a dotted tail or a whole name as in `named_modules()`, or "all-linear"."""
    rslora: bool = False
    """Divide alpha by sqrt(rank) instead of rank (rsLoRA, arXiv:2312.03732)."""
    dora: bool = False
    """Learn the length of each row of the weight apart from its direction (DoRA, arXiv:2402.09353)."""

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ModelError(f"LoRA rank is {self.rank!r}; set a whole number of at least 1")
        if not (isinstance(self.alpha, int | float) and math.isfinite(self.alpha) and self.alpha > 0):
            raise ModelError(f"LoRA alpha is {self.alpha!r}; set a finite alpha above 0")
        if isinstance(self.targets, str) or not self.targets:
            raise ModelError(
                f'LoRA targets is {self.targets!r}; write a tuple of module names, as ("q_proj", "v_proj")'
            )

    @property
    def scaling(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Adapter(nn.Module):
    """The low-rank term of one Linear: W becomes W + s B A, with DoRA m (W + s B A) / ||W + s B A|| row by row.

    Parameters: `a` [rank, in], `b` [out, rank], and with DoRA `magnitude` [out] (m). They take device and dtype
    of the Linear's weight, or `dtype`; on the meta device they have no values until reset().
    """

    def __init__(self, linear: Linear, lora: LoRA, *, seed: int, dtype: torch.dtype | None = None):
        """
        Args:
            seed: of this adapter alone; the same values come of it on every rank, device and dtype.
        """
        super().__init__()
        like = {"device": linear.weight.device, "dtype": dtype or linear.weight.dtype}
        self.scaling, self.seed = lora.scaling, seed
        self.a = nn.Parameter(torch.empty(lora.rank, linear.in_features, **like))
        self.b = nn.Parameter(torch.empty(linear.out_features, lora.rank, **like))
        self.magnitude = nn.Parameter(torch.empty(linear.out_features, **like)) if lora.dora else None
        self.partial: tuple[str, ...] = ()
        """Which of `a` and `b` is whole on ranks that each find a part of its gradient (model/parallel.py)."""

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        """Draw `a` uniform in +-1/sqrt(in), set `b` zero and `magnitude` to the row norms of `weight` [out, in].

        Both matrices as PEFT's, whose Kaiming bound with slope sqrt(5) is 1/sqrt(in): the adapted Linear is the
        same function as before.
        """
        drawn = torch.empty(self.a.shape, dtype=torch.float32)  # on the CPU, so that every device holds the same
        bound = 1 / math.sqrt(self.a.shape[1])
        drawn.uniform_(-bound, bound, generator=torch.Generator().manual_seed(self.seed))
        fill(self.a, drawn)
        self.b.zero_()
        if self.magnitude is not None:
            fill(self.magnitude, self._row_norms(weight))

    def forward(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """What stands in for y = x W^T: x [..., in], y [..., out], weight [out, in]; the result has y's dtype."""
        a, b = (local(getattr(self, name), partial=name in self.partial) for name in ("a", "b"))
        low = F.linear(x.to(a.dtype), a) * self.scaling  # scaled while it is narrow
        adapted = y + F.linear(low, b)
        if self.magnitude is not None:
            adapted = (self.magnitude / self._row_norms(weight)) * adapted
        return adapted.to(y.dtype)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The one weight [out, in] that does what `weight` and this adapter do; computed in float32, in its dtype."""
        total = self._total(weight)
        if self.magnitude is not None:  # the ratio in its own dtype, as forward() has it
            total = total * (full(self.magnitude) / self._row_norms(weight))[:, None]
        return total.to(weight.dtype)

    def _total(self, weight: Tensor) -> Tensor:
        """W + s B A in float32, or wider where the weight is."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight, a, b = (full(each).to(wide) for each in (weight, self.a, self.b))
        return torch.addmm(weight, b, a, alpha=self.scaling)

    @torch.no_grad()  # DoRA section 4.3: the norm is a constant to the gradient
    def _row_norms(self, weight: Tensor) -> Tensor:
        """||W + s B A|| of each row [out], rounded as the magnitude is: their ratio is exactly 1 after reset()."""
        assert self.magnitude is not None
        return torch.linalg.vector_norm(self._total(weight), dim=1).to(self.magnitude.dtype)


def add_lora(model: nn.Module, lora: LoRA, *, seed: int, dtype: torch.dtype | None = None) -> list[str]:
    """Put an Adapter into every Linear that a target names and freeze all other parameters, those of heads too.

    Args:
        seed: of the run; each adapter draws from its own, made of this one and the Linear's name.
        dtype: of the adapters' parameters; the weight's when None.

    Returns:
        Names of the adapted Linears, in the model's order. On the meta device they await reset_adapters().

    Raises:
        ModelError: a target names no Linear or a head, or the model has adapters already.
    """
    if any(True for _ in adapters(model)):
        raise ModelError("the model has adapters already; merge_lora() them before add_lora()")
    found = dict(linears(model))
    _check_targets(lora.targets, found)
    chosen = select(lora.targets, found)
    model.requires_grad_(False)
    for name in chosen:
        own_seed = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7])
        found[name].adapter = Adapter(found[name], lora, seed=own_seed, dtype=dtype)
    if not any(found[name].weight.is_meta for name in chosen):
        reset_adapters(model)
    return chosen


def reset_adapters(model: nn.Module) -> None:
    """Give every adapter its first values: after add_lora() on the meta device, to_empty() and the weights' loading."""
    for _, linear, adapter in adapters(model):
        adapter.reset(linear.weight)


def merged_weight(linear: Linear) -> Tensor:
    """W [out, in] with the adapter's term merged, in W's dtype; W itself, detached, where there is no adapter."""
    if isinstance(linear.adapter, Adapter):
        return linear.adapter.merged(linear.weight)
    return full(linear.weight.detach())


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Merge every adapter into its weight in place, remove it, and let every parameter have gradients again."""
    for _, linear, adapter in list(adapters(model)):
        fill(linear.weight, adapter.merged(linear.weight))
        linear.adapter = None
    model.requires_grad_(True)


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapters' parameters under the names that `model.named_parameters()` gives them."""
    for name, _, adapter in adapters(model):
        for part, parameter in adapter.named_parameters():
            yield f"{name}.adapter.{part}", parameter


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Forward passes inside are the base model's, bitwise: the reference policy of DPO and GRPO.

    The adapters are out of the model meanwhile, its named parameters included; a backward pass belongs to the
    same side as its forward pass, which activation checkpointing repeats.
    """
    removed = [(linear, adapter) for _, linear, adapter in adapters(model)]
    try:
        for linear, _ in removed:
            linear.adapter = None  # not a switch in the adapter: a Linear with a bias would round otherwise
        yield
    finally:
        for linear, adapter in removed:
            linear.adapter = adapter


def linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The Linears that may be adapted, by name: not the heads, and not a router, which PEFT cannot adapt either."""
    for name, module in model.named_modules():
        if type(module) is Linear and not _in_head(name):
            yield name, module


def adapters(model: nn.Module) -> Iterator[tuple[str, Linear, Adapter]]:
    """Adapted Linears: name, module, adapter."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and isinstance(module.adapter, Adapter):
            yield name, module, module.adapter


def select(targets: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of `names` that a target is, or is the dotted tail of, in their order; PEFT's rule for target_modules."""
    targets = set(targets)
    return [name for name in names if ALL_LINEAR in targets or any(_matches(name, target) for target in targets)]


def shortest_targets(chosen: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """Targets that select exactly `chosen` of `names`: last components where they suffice, else the whole names."""
    chosen = set(chosen)
    short = sorted({name.rpartition(".")[2] for name in chosen})
    return tuple(short if set(select(short, names)) == chosen else sorted(chosen))


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _in_head(name: str) -> bool:
    return not set(HEADS).isdisjoint(name.split("."))


def _check_targets(targets: tuple[str, ...], names: Iterable[str]) -> None:
    """Refuse targets that would adapt nothing."""
    names = list(names)
    if head := [target for target in targets if _in_head(target)]:
        raise ModelError(f"LoRA targets {head}: a head cannot be adapted; remove it from targets")
    missing = [target for target in targets if target != ALL_LINEAR and not select([target], names)]
    if not missing:
        return
    known = sorted({name.rpartition(".")[2] for name in names})
    hints = []
    for target in missing:
        near = difflib.get_close_matches(target, [*known, *names, ALL_LINEAR], n=1, cutoff=0.5)
        hints.append(f'"{target}"' + (f' (did you mean "{near[0]}"?)' if near else ""))
    raise ModelError(
        f"LoRA targets {', '.join(hints)} match no Linear of the model; it has {', '.join(known) or 'none'}; "
        f'name some of these, or "{ALL_LINEAR}"'
    )
