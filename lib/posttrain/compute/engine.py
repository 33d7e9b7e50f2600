"""The engine: model + optimizer + schedule on one rank. The only backward() and the only optimizer.step()."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from posttrain.compute.collective import Ranks, clip_grad_norm
from posttrain.data.types import Batch
from posttrain.errors import ComputeError


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
        forward: Callable[..., Any],
        loss_sum: Callable[..., tuple[Tensor, dict[str, Tensor]]],
        named_weights: Callable[[Any], Iterable[tuple[str, Tensor]]],
        lr_scale: Callable[[int], float],
        max_grad_norm: float,
    ):
        """
        Args:
            forward: (model, batch, temperature=) -> Output.
            loss_sum: (model, batch, loss_fn, scale=) -> scaled loss sum with gradient, and metric sums, "loss" among
                them.
            named_weights: (model) -> tensors under Hugging Face names.
            lr_scale: (step) -> factor on the optimizer's initial learning rates.
        """
        self.model, self.optimizer, self.ranks = model, optimizer, ranks
        self._forward, self._loss_sum = forward, loss_sum
        self._named_weights, self._lr_scale = named_weights, lr_scale
        self.max_grad_norm = max_grad_norm
        self._peak_lrs = [group["lr"] for group in optimizer.param_groups]

    def train_step(
        self, step: int, batches: Sequence[Batch], loss_fn: Any, *, denominator: float, repeats: int = 0
    ) -> dict[str, float]:
        """One optimizer step over this rank's micro-batches; metrics are global, equal on all ranks.

        Args:
            batches: this rank's share; may be empty, its gradient is then zero. Ranks of a sharded model must have
                equally many, as each gathers its parameters with all others.
            repeats: so many of the last are another's, taken along for that reason; they count nothing.
            loss_fn: what loss_sum reads; see model/losses.
            denominator: loss tokens of the global batch, over all ranks and micro-batches.

        Raises:
            ComputeError: loss or gradient is NaN or infinite. No rank has then changed its weights.
        """
        start = time.perf_counter()
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            counts = number < len(batches) - repeats
            loss, metrics = self._loss_sum(self.model, batch, loss_fn, scale=counts / denominator)
            loss.backward()
            for name, value in metrics.items() if counts else ():
                sums[name] = sums.get(name, 0.0) + value.detach().double()
        self.ranks.sum_gradients(self.model.parameters())
        total = clip_grad_norm(self.model.parameters(), self.max_grad_norm)
        # The one place of a step where the host waits for the device.
        norm, *read = torch.stack([total.double(), *sums.values()]).tolist()
        forward_backward = time.perf_counter()
        means = self._global_means(dict(zip(sums, read, strict=True)), denominator)
        if not math.isfinite(norm) or not all(map(math.isfinite, means.values())):
            self.optimizer.zero_grad(set_to_none=True)
            raise ComputeError(f"step {step}: gradient norm {norm}, metrics {means}; the weights were not changed")
        for group, peak in zip(self.optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak * self._lr_scale(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        done = time.perf_counter()
        return means | {
            "grad_norm": norm,
            "lr": self.optimizer.param_groups[0]["lr"],
            "time/forward_backward_s": forward_backward - start,
            "time/optimizer_s": done - forward_backward,
        }

    @torch.no_grad()
    def logprobs(self, batch: Batch, *, temperature: float) -> Tensor:
        """[N] float32, nats: log p of the targets that carry loss, without gradient."""
        return self._forward(self.model, batch, temperature=temperature).logprobs

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Current weights under Hugging Face names, one at a time."""
        yield from self._named_weights(self.model)

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run must hold, as flat named tensors: parameters and optimizer moments."""
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore state(); names and shapes must be those of this engine."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            prefix = f"optimizer.{name}."
            self.optimizer.state[parameter] = {
                key.removeprefix(prefix): value.to(parameter.device)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }

    def _global_means(self, sums: dict[str, float], denominator: float) -> dict[str, float]:
        """Metric sums over all ranks, divided by the global count. An empty rank adds zeros."""
        names = sorted(sums)
        if self.ranks.world_size > 1:
            names = self._agree_on_names(names)
        totals = self.ranks.sum([sums.get(name, 0.0) for name in names])
        return {name: total / denominator for name, total in zip(names, totals, strict=True)}

    def _agree_on_names(self, names: list[str]) -> list[str]:
        gathered: list[list[str]] = [[] for _ in range(self.ranks.world_size)]
        torch.distributed.all_gather_object(gathered, names)
        return max(gathered, key=len)
