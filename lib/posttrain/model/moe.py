"""Mixture of experts over flat tokens: route, sort by expert, one grouped matmul for all of them, weigh, sum.

Shapes do not depend on the routing and nothing is read back to the host, so a step never waits for the
device and never recompiles.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posttrain.model.collectives import Group, all_to_all, copy_in, local, reduce_out
from posttrain.model.families import DecoderConfig, Experts
from posttrain.model.layers import Linear


class Router(Linear):
    """Scores every expert for every token and keeps the top k."""

    def __init__(self, hidden_size: int, experts: Experts):
        super().__init__(hidden_size, experts.count, bias=experts.bias)
        self.top_k, self.softmax_first, self.normalize = experts.top_k, experts.softmax_first, experts.normalize

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, d] -> weights [T, k] in x's dtype, and expert numbers [T, k] int64.

        The precisions are the families' own: Qwen3 takes the softmax in float32 over all experts
        (modeling_qwen3_moe), GPT-OSS in the logits' dtype over the chosen ones (modeling_gpt_oss).
        """
        scores = self(x)
        if not self.softmax_first:
            chosen, experts = scores.topk(self.top_k, dim=-1)
            return chosen.softmax(-1), experts
        weights, experts = scores.float().softmax(-1).topk(self.top_k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), experts


class ExpertMLPs(nn.Module):
    """The gated MLPs of all experts, stacked: gate rows, then up rows."""

    def __init__(self, hidden_size: int, experts: Experts):
        super().__init__()
        count, size = experts.count, experts.mlp_size
        self.beside_others = False
        """Rows of experts that other ranks hold come along, after those of this rank's."""
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(count, hidden_size, size))
        self.gate_up_bias = nn.Parameter(torch.empty(count, 2 * size)) if experts.bias else None
        self.down_bias = nn.Parameter(torch.empty(count, hidden_size)) if experts.bias else None
        self.limit, self.alpha = experts.limit, experts.alpha

    def forward(self, x: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
        """[R, d] rows sorted by expert -> [R, d]; zeros for the rows of experts that other ranks hold.

        Args:
            experts: [R] int64, the expert of each row, ascending.
            ends: [E] int32, where each held expert's rows end; those of others come after them.
        """
        gate_up, down = local(self.gate_up_proj), local(self.down_proj)
        rest = None
        if self.beside_others:
            rest = (torch.arange(len(x), device=x.device) >= ends[-1])[:, None]
            experts = experts.clamp(max=len(gate_up) - 1)

        def matmul(x: Tensor, weight: Tensor) -> Tensor:
            # grouped_mm leaves rows after the last end undefined, of its output and of the gradient of its input.
            x = x if rest is None else x.masked_fill(rest, 0)
            y = F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
            return y if rest is None else y.masked_fill(rest, 0)

        hidden = matmul(x, gate_up)
        if self.gate_up_bias is None or self.down_bias is None:
            gate, up = hidden.chunk(2, dim=-1)
            return matmul(F.silu(gate) * up, down)
        gate, up = (hidden + local(self.gate_up_bias)[experts]).chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        out = matmul((up + 1) * (gate * torch.sigmoid(gate * self.alpha)), down) + local(self.down_bias)[experts]
        return out if rest is None else out.masked_fill(rest, 0)


class MoE(nn.Module):
    """Router and experts in place of a dense MLP, over [T, d]."""

    load: Tensor
    """[E] float32, share of the last batch's routed rows that each expert took; its mean is 1 / E."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        assert config.experts is not None, "a layer without experts has an MLP"
        self.count, self.top_k = config.experts.count, config.experts.top_k
        self.router = Router(config.hidden_size, config.experts)
        self.experts = ExpertMLPs(config.hidden_size, config.experts)
        self.register_buffer("load", torch.zeros(self.count), persistent=False)
        self.tensor: Group | None = None
        """Ranks that have the same tokens and hold the other experts (model/parallel.py)."""
        self.expert: Group | None = None
        """Ranks that have tokens of their own and hold the other experts."""

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.router.choose(x)
        if self.expert is not None:
            return self._exchanged(x, weights, experts, self.expert)
        x, weights = copy_in(x, self.tensor), copy_in(weights, self.tensor)
        first, held = 0, self.count
        if self.tensor is not None:
            held = self.count // self.tensor.size
            first = held * self.tensor.rank
        flat = (experts.flatten() - first) % self.count  # the experts of this rank come first
        order = flat.argsort(stable=True)
        counts = torch.zeros(self.count, dtype=torch.int32, device=x.device)
        counts = counts.scatter_add(0, flat, torch.ones_like(flat, dtype=torch.int32))
        self.load.copy_(counts.roll(first).float() / flat.numel())
        back = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=x.device))
        rows = x[:, None, :].expand(-1, self.top_k, -1).reshape(len(flat), -1)
        ends = counts[:held].cumsum(0, dtype=torch.int32)
        out = self.experts(_Permute.apply(rows, order, back), flat[order], ends)
        out = (_Permute.apply(out, back, order).view(*experts.shape, -1) * weights[..., None]).sum(1)
        return reduce_out(out, self.tensor)

    def leave_exchange_uncompiled(self) -> None:
        """Before a block with ranks of its experts is compiled: the exchange's shapes follow the routing. (A decorator
        on it would load the compiler wherever this module is imported.)"""
        self._exchanged = torch.compiler.disable(self._exchanged)  # pyright: ignore[reportAttributeAccessIssue]

    def _exchanged(self, x: Tensor, weights: Tensor, experts: Tensor, group: Group) -> Tensor:
        """forward() where experts lie on the ranks of a group: rows go to their experts and come back.

        How many go where decides shapes, so the host waits for the device here, once a layer.
        """
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        back = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=x.device))
        counts = flat.new_zeros(self.count).scatter_add(0, flat, torch.ones_like(flat))
        self.load.copy_(counts.float() / flat.numel())
        held = self.count // group.size
        coming = all_to_all(counts, [held] * group.size, [held] * group.size, group).view(group.size, held)
        sent, received = torch.stack((counts.view(group.size, held).sum(1), coming.sum(1))).tolist()
        rows = x[:, None, :].expand(-1, self.top_k, -1).reshape(len(flat), -1)
        rows = all_to_all(_Permute.apply(rows, order, back), sent, received, group)
        out = all_to_all(self._held(rows, coming), received, sent, group)
        return (_Permute.apply(out, back, order).view(*experts.shape, -1) * weights[..., None]).sum(1)

    def _held(self, rows: Tensor, coming: Tensor) -> Tensor:
        """The experts of this rank over rows that came [R, d], sorted by expert from each rank in turn.

        Args:
            coming: [ranks, experts held] int64, how many of each.
        """
        empty = not len(rows)
        if empty:  # grouped_mm has no gradient of nothing, and FSDP reduces one of every rank: a row of zeros
            rows, coming = F.pad(rows, (0, 0, 0, 1)), coming.clone()
            coming[0, 0] = 1
        ranks, held = coming.shape
        experts = torch.arange(held, device=rows.device).repeat(ranks)
        experts = experts.repeat_interleave(coming.flatten(), output_size=len(rows))
        order = experts.argsort(stable=True)
        back = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=rows.device))
        ends = coming.sum(0).cumsum(0).to(torch.int32)
        out = _Permute.apply(self.experts(_Permute.apply(rows, order, back), experts[order], ends), back, order)
        return out[:0] if empty else out


class _Permute(torch.autograd.Function):
    """x[index] for a permutation: its gradient is the other permutation, with no atomics and so in one fixed order."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[index]

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (inverse,) = ctx.saved_tensors
        return grads[0][inverse], None, None


@torch.no_grad()
def router_metrics(model: nn.Module) -> dict[str, Tensor]:
    """How even the last batch's routing was, over the MoE layers of `model`; empty for a dense model.

    Ranks that share a batch's tokens call it together and get the same: each routed equally many.

    Returns:
        router/max_load: the busiest expert's share over the mean share, the worst layer's; 1 is even.
        router/idle: share of experts that took no token, mean over layers.
        router/entropy: of the shares, over log E, mean over layers; 1 is even.
    """
    loads = [module.load for module in model.modules() if isinstance(module, MoE)]
    if not loads:
        return {}
    context = getattr(model, "context", None)
    load = reduce_out(torch.stack(loads), context) / (1 if context is None else context.size)
    entropy = torch.special.entr(load).sum(-1) / math.log(load.shape[1])
    return {
        "router/max_load": (load.max(-1).values * load.shape[1]).max(),
        "router/idle": (load == 0).float().mean(),
        "router/entropy": entropy.mean(),
    }
