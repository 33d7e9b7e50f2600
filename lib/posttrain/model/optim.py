"""AdamW with decay on matrices only; and one for bfloat16 weights without a float32 copy, by stochastic rounding."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from posttrain.model import optim_kernels
from posttrain.model.collectives import local


def adamw(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    stochastic: bool = False,
) -> Optimizer:
    """AdamW (arXiv:1711.05101) over two groups: matrices decay, norms and other vectors do not.

    Args:
        stochastic: weights and moments stay in the parameters' bfloat16 (see StochasticAdamW).
    """
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    if stochastic:
        return StochasticAdamW(groups, lr=lr, betas=betas)
    return AdamW(groups, lr=lr, betas=betas, fused=True)


class StochasticAdamW(Optimizer):
    """AdamW whose bfloat16 weights and moments are rounded up or down by chance, right on average (arXiv:2010.06192).

    Rounding to nearest would drop every update below a 256th of a weight. Six bytes a parameter beside the gradient's
    two, instead of sixteen. The draws are a function of the step, so a resumed run repeats them.
    """

    def __init__(self, groups: list[dict], *, lr: float, betas: tuple[float, float], eps: float = 1e-8):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update; a parameter without gradient stays as it is."""
        assert closure is None, "the engine has the gradients already"
        taken = max(
            (int(state["step"]) for state in list(self.state.values())[:1]), default=0
        )  # the device is idle here
        generators: dict[torch.device, torch.Generator] = {}
        every = ((group, parameter) for group in self.param_groups for parameter in group["params"])
        for place, (group, parameter) in enumerate(every):
            if parameter.grad is None:
                continue
            state = self._state_of(parameter)
            state["step"] += 1
            tensors = tuple(map(local, (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])))
            if optim_kernels.serves(*tensors):
                numbers = {name: group[name] for name in ("lr", "weight_decay", "betas", "eps")}
                optim_kernels.update(tensors, state["step"], seed=((taken + 1) << 32) + place, **numbers)
                continue
            device = parameter.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(taken + 1)
            self._update(parameter, group, generators[device])

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _update(self, parameter: nn.Parameter, group: dict, generator: torch.Generator) -> None:
        """The step in plain operations, for a CPU and for what the kernel does not take."""
        state = self.state[parameter]
        (beta1, beta2), lr = group["betas"], group["lr"]
        gradient = parameter.grad.float()  # pyright: ignore[reportOptionalMemberAccess]
        mean = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        weight = parameter.float().mul_(1 - lr * group["weight_decay"])
        weight.sub_(mean / (1 - beta1 ** state["step"]) / scale * lr)
        for target, value in ((state["exp_avg"], mean), (state["exp_avg_sq"], square), (parameter, weight)):
            round_stochastically(value, target, generator)


def round_stochastically(value: Tensor, target: Tensor, generator: torch.Generator) -> None:
    """target <- value, rounded to one of the two nearest bfloat16 numbers with the chances that make it right on
    average: a bfloat16 is the upper half of a float32, and a random lower half carries into it as often as it should.

    Args:
        value: float32, overwritten.
        target: of the same shape; float32 keeps the value itself.
    """
    if target.dtype != torch.bfloat16:
        target.copy_(value)
        return
    bits = value.view(torch.int32)
    bits += torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    bits &= -(1 << 16)
    target.copy_(value)
