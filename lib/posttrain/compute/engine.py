"""The engine: model + optimizer + schedule on one rank. The only backward() and the only optimizer.step()."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from posttrain import faults
from posttrain.compute.collective import Ranks, clip_grad_norm
from posttrain.compute.master import Masters
from posttrain.compute.replicas import CHECK_EVERY, check_replicas, replica
from posttrain.compute.step_timer import StepTimer
from posttrain.data.types import Batch
from posttrain.errors import ComputeError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFunctions:
    """What an engine asks of the models that it trains."""

    forward: Callable[..., Any]
    """(model, batch, temperature=) -> Output."""
    loss_sum: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    """(model, batch, loss_fn, scale=) -> scaled loss sum with gradient, and metric sums, "loss" among them."""
    named_weights: Callable[[Any], Iterable[tuple[str, Tensor]]]
    """(model) -> tensors under Hugging Face names."""


class Engine:
    """Trains one replica of a model in step with its peers.

    The engine knows no model family and no method: the model, the forward and the loss
    are handed in, and every recipe runs on this class.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        ranks: Ranks,
        functions: ModelFunctions,
        lr_scale: Callable[[int], float],
        max_grad_norm: float,
        masters: Masters | None = None,
    ):
        """
        Args:
            optimizer: over the model's parameters, or over `masters` where those are given.
            lr_scale: (step) -> factor on the optimizer's initial learning rates.
        """
        self.model, self.optimizer, self.ranks = model, optimizer, ranks
        self._functions, self._lr_scale = functions, lr_scale
        self.max_grad_norm, self._masters = max_grad_norm, masters
        self._stepped_on = [p for group in optimizer.param_groups for p in group["params"]]
        self._peak_lrs = [group["lr"] for group in optimizer.param_groups]

    def train_step(
        self,
        step: int,
        batches: Sequence[Batch],
        loss_fn: Any,
        *,
        denominator: float,
        repeats: int = 0,
        timer: StepTimer | None = None,
    ) -> dict[str, float]:
        """One optimizer step over this rank's micro-batches; metrics but the times are global, equal on all ranks.

        Args:
            batches: this rank's share; may be empty, its gradient is then zero. Ranks of a sharded model must have
                equally many, as each gathers its parameters with all others.
            repeats: so many of the last are another's, taken along for that reason; they count nothing.
            loss_fn: what loss_sum reads; see model/losses.
            denominator: loss tokens of the global batch, over all ranks and micro-batches.
            timer: one that began before, with what led to the step.

        Returns:
            metric means, grad_norm, lr, and time/{forward,backward,reduce,optimizer}_s of this rank; "reduce" is
            the sum over the ranks, with the wait for the slowest of them, and the clipping.

        Raises:
            ComputeError: loss or gradient is NaN or infinite, or replicas of the model differ. No rank has then
                changed its weights.
        """
        timer = timer or StepTimer(self.ranks.device)
        self._check_replicas(step)
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            counts = number < len(batches) - repeats
            loss, metrics = self._functions.loss_sum(self.model, batch, loss_fn, scale=counts / denominator)
            timer.mark("forward")
            loss.backward()
            timer.mark("backward")
            for name, value in metrics.items() if counts else ():
                sums[name] = sums.get(name, 0.0) + value.detach().double()
        self.ranks.sum_gradients(self._stepped_on)
        total = clip_grad_norm(self._stepped_on, self.max_grad_norm)
        timer.mark("reduce")
        # The one place of a step where the host waits for the device.
        norm, *read = torch.stack([total.double(), *sums.values()]).tolist()
        timer.synced()
        means = self._global_means(dict(zip(sums, read, strict=True)), denominator)
        timer.mark("reduce")
        if not math.isfinite(norm) or not all(map(math.isfinite, means.values())):
            self.optimizer.zero_grad(set_to_none=True)
            raise ComputeError(f"step {step}: gradient norm {norm}, metrics {means}; the weights were not changed")
        faults.point("engine.before_update", self.ranks.rank)
        for group, peak in zip(self.optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak * self._lr_scale(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._masters is not None:
            self._masters.publish()
        timer.mark("optimizer")
        return means | {"grad_norm": norm, "lr": self.optimizer.param_groups[0]["lr"]} | timer.metrics()

    @torch.no_grad()
    def evaluate(
        self, batches: Sequence[Batch], loss_fn: Any, *, denominator: float, repeats: int = 0
    ) -> dict[str, float]:
        """The metrics that train_step() would have, of batches that are not trained on."""
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            _, metrics = self._functions.loss_sum(self.model, batch, loss_fn, scale=1.0)
            for name, value in metrics.items() if number < len(batches) - repeats else ():
                sums[name] = sums.get(name, 0.0) + value.double()
        read = torch.stack(list(sums.values())).tolist() if sums else []
        return self._global_means(dict(zip(sums, read, strict=True)), denominator)

    @torch.no_grad()
    def logprobs(self, batch: Batch, *, temperature: float) -> Tensor:
        """[N] float32, nats: log p of the targets that carry loss, without gradient."""
        return self._functions.forward(self.model, batch, temperature=temperature).logprobs

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Current weights under Hugging Face names, one at a time."""
        yield from self._functions.named_weights(self.model)

    def parameters(self) -> dict[str, Tensor]:
        """The part of state() that is the model, named as there."""
        return {f"model.{name}": parameter.detach() for name, parameter in self._held()}

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run must hold, as flat named tensors: parameters and optimizer moments."""
        tensors = self.parameters()
        for name, parameter in self._held():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    @torch.no_grad()
    def state_to_fill(self) -> dict[str, Tensor]:
        """state(), with the optimizer's moments even before the first step: the tensors to read a checkpoint into.

        A new optimizer makes its moments in a step without gradient and without learning rate.
        """
        if not self.optimizer.state:
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0  # train_step() sets it
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return self.state()

    def filled(self) -> None:
        """To be called once the tensors of state_to_fill() hold a checkpoint's values."""
        if self._masters is not None:
            self._masters.publish()

    def _held(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter in the precision that it is trained in, under its name in the model."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter if self._masters is None else self._masters.of(parameter)

    def _check_replicas(self, step: int) -> None:
        if self.ranks.world_size > 1 and step and step % CHECK_EVERY == 0:
            check_replicas(self._gathered(replica(self._held())), step=step)

    def _global_means(self, sums: dict[str, float], denominator: float) -> dict[str, float]:
        """Metric sums over all ranks, divided by the global count. An empty rank adds zeros."""
        names = sorted(sums)
        if self.ranks.world_size > 1:
            names = max(self._gathered(names), key=len)
        totals = self.ranks.sum([sums.get(name, 0.0) for name in names])
        return {name: total / denominator for name, total in zip(names, totals, strict=True)}

    def _gathered(self, mine: Any) -> list[Any]:
        """A plain value of every rank, in rank order."""
        gathered: list[Any] = [None] * self.ranks.world_size
        torch.distributed.all_gather_object(gathered, mine)
        return gathered
