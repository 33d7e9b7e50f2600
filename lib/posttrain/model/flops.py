"""Floating-point operations that a training step of a Decoder needs, so that a time becomes a share of the device.

A model enters; what a token, a visible pair of positions, a loss row and a scored document cost leaves. Documents
count at their own lengths, windows and frozen parameters for what they save. Not counted: padding of pack and
vocabulary, work that is done twice (checkpointed activations, attention's scores and a two-pass loss's logits in the
backward), and all but matmuls: norms, softmax, and DoRA's row norms, which cost 2 * rank a weight once a micro-batch.
A multiply-add is two operations.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from posttrain.model.decoder import Block, Decoder
from posttrain.model.layers import MLP, Linear
from posttrain.model.lora import Adapter
from posttrain.model.moe import MoE


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of one pass forward, and of its backward with respect to inputs and to weights."""

    forward: float = 0.0
    input_grad: float = 0.0
    weight_grad: float = 0.0

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.input_grad + self.weight_grad

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.forward + other.forward, self.input_grad + other.input_grad, self.weight_grad + other.weight_grad
        )

    def __mul__(self, count: float) -> "Flops":
        return Flops(self.forward * count, self.input_grad * count, self.weight_grad * count)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopCounts:
    """What one unit of each kind costs a model, as it is trained: see flop_counts()."""

    token: Flops
    """Every matmul between the embedding and the heads; of experts those that a token meets, and the router."""
    pairs: dict[int | None, Flops]
    """window -> a pair of positions of which one sees the other, over all layers with that window."""
    row: Flops
    """A position that the LM head reads."""
    sample: Flops
    """A document that the score heads read."""
    palm_params: float
    """N of palm()."""
    palm_width: int
    """L * H * head_dim of palm()."""

    def batch(self, doc_lens: Sequence[int], num_rows: int, *, num_samples: int = 0) -> Flops:
        """The parts of what step() sums.

        Args:
            doc_lens: tokens of each real document, in any order and number of packs: the tail of a pack is none.
            num_rows: positions that the LM head reads; 0 for a loss that reads scores alone.
            num_samples: documents that the score heads read; 0 for a loss that reads tokens or a teacher.
        """
        tokens = sum(int(length) for length in doc_lens)
        flops = self.token * tokens + self.row * num_rows + self.sample * num_samples
        for window, pair in self.pairs.items():
            flops += pair * sum(visible_pairs(int(length), window) for length in doc_lens)
        return flops

    def step(self, doc_lens: Sequence[int], num_loss_rows: int, *, num_samples: int = 0) -> float:
        """FLOPs of forward and backward over these documents; see batch(). The optimizer is not among them, and a
        reference's or teacher's forward() is to be counted on that model."""
        return self.batch(doc_lens, num_loss_rows, num_samples=num_samples).total

    def forward(self, doc_lens: Sequence[int], num_rows: int, *, num_samples: int = 0) -> float:
        """FLOPs of the forward pass alone, as for a reference's logprobs; see batch()."""
        return self.batch(doc_lens, num_rows, num_samples=num_samples).forward

    def palm(self, num_tokens: int, seq_len: int) -> float:
        """FLOPs of a step by PaLM's convention (arXiv:2204.02311, appendix B): 6 N + 12 L H head_dim seq_len a token.

        It counts frozen parameters as trained, the head on every token, attention to later tokens and past every
        window, at one length for all documents: for comparing with who reports it so. N is every parameter but an
        input embedding of its own and the vocabulary's padding; of experts the share that a token meets.
        """
        return num_tokens * (6.0 * self.palm_params + 12.0 * self.palm_width * seq_len)


def visible_pairs(length: int, window: int | None) -> int:
    """Pairs (i, j) of a document's positions with i - window < j <= i; window None is the whole document."""
    reach = length if window is None else min(length, window)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def flop_counts(model: Decoder) -> FlopCounts:
    """Count a model as it stands: its adapters, and what is frozen.

    A matmul's gradient with respect to its weight is made where the weight is trained, and with respect to its input
    where anything below is: the same walk that autograd does. Of a user's own score head the Linears count, each
    run once a document in the order of their definition.
    """
    config = model.config
    token, row, sample = Flops(), Flops(), Flops()
    pairs: dict[int | None, Flops] = {}
    flows = _trained(model.embedding)
    for block, window in zip(model.layers, config.windows, strict=True):
        assert isinstance(block, Block)
        here, pair, flows = _block(block, flows)
        token += here
        pairs[window] = pairs.get(window, Flops()) + pair
    flows = flows or _trained(model.norm)
    if model.output_head is not None:
        row = _matmul(config.vocab_size * config.hidden_size, model.output_head.weight, flows)
    for head in model.heads.values():
        sample += _score_head(head, flows)
    return FlopCounts(
        token=token,
        pairs=pairs,
        row=row,
        sample=sample,
        palm_params=_palm_params(model),
        palm_width=config.attention_width,
    )


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of the data sheet (half of what is printed for sparse matrices), None where unknown.

    Args:
        device_name: as torch.cuda.get_device_name() says it.
    """
    name = device_name.strip().removeprefix("NVIDIA ")
    return next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, name)), None)


PEAKS = {
    r"A100-(SXM4|PCIE)-(40|80)GB|A100 80GB PCIe": 312e12,
    r"H100 80GB HBM3|H200": 989e12,
    r"H100 PCIe": 756e12,
    r"H100 NVL|H200 NVL": 835.5e12,
    r"L40S": 362.05e12,
    r"B200": 2250e12,
}
"""Whole names, as a part of one is another device: L40 in L40S, H200 in GH200, any of them before a slice's "MIG"."""


def mfu(flops: float, seconds: float, num_devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation, a share of 1; None where the peak is not known, as it is then not to be guessed.

    Args:
        flops: of all devices together, step() or palm().
        peak: of one device, FLOP/s.
    """
    return None if peak is None else flops / (seconds * num_devices * peak)


def _block(block: Block, flows: bool) -> tuple[Flops, Flops, bool]:
    """A token's and a pair's cost, and whether the output needs a gradient, given whether the input does."""
    attention = block.attention
    inner = flows or _trained(block.attention_norm)
    projections, needs = Flops(), []
    for linear, norm in (
        (attention.q_proj, attention.q_norm),
        (attention.k_proj, attention.k_norm),
        (attention.v_proj, None),
    ):
        projections += _linear(linear, inner)
        needs.append(inner or _trained(linear) or _trained(norm))
    q, k, v = needs
    multiplied = 2.0 * attention.q_proj.out_features  # one of the matmuls q k^T and p v, a pair
    # Of a gradient: that of p where q or k needs it, then theirs, and that of v.
    pair = Flops(2 * multiplied, multiplied * ((q or k) + q + k + v))
    inner = q or k or v or (attention.sinks is not None and attention.sinks.requires_grad)
    token = projections + _linear(attention.o_proj, inner)
    flows = flows or inner or _trained(attention.o_proj) or _trained(block.attention_out_norm)
    inner = flows or _trained(block.mlp_norm)
    token += _moe(block.mlp, inner) if isinstance(block.mlp, MoE) else _mlp(block.mlp, inner)
    return token, pair, inner or _trained(block.mlp) or _trained(block.mlp_out_norm)


def _mlp(mlp: MLP, flows: bool) -> Flops:
    inner = flows or _trained(mlp.gate_proj) or _trained(mlp.up_proj)
    return _linear(mlp.gate_proj, flows) + _linear(mlp.up_proj, flows) + _linear(mlp.down_proj, inner)


def _moe(moe: MoE, flows: bool) -> Flops:
    experts = moe.experts
    first = (experts.gate_up_proj, experts.gate_up_bias)
    inner = flows or any(part is not None and part.requires_grad for part in first)
    met = _matmul(experts.gate_up_proj.numel() / moe.count, experts.gate_up_proj, flows)
    met += _matmul(experts.down_proj.numel() / moe.count, experts.down_proj, inner)
    return _linear(moe.router, flows) + met * moe.top_k


def _linear(linear: Linear, flows: bool) -> Flops:
    """A Linear and its adapter, given whether the input needs a gradient."""
    flops = _matmul(linear.in_features * linear.out_features, linear.weight, flows)
    if isinstance(linear.adapter, Adapter):
        a, b = linear.adapter.a, linear.adapter.b
        flops += _matmul(a.numel(), a, flows) + _matmul(b.numel(), b, flows or a.requires_grad)
    return flops


def _score_head(head: nn.Module, flows: bool) -> Flops:
    flops = Flops()
    for module in head.modules():
        if isinstance(module, Linear | nn.Linear):
            flops += _matmul(module.in_features * module.out_features, module.weight, flows)
            flows = flows or _trained(module)
    return flops


def _matmul(size: float, weight: Tensor, flows: bool) -> Flops:
    """One vector times `size` elements of a weight."""
    return Flops(2.0 * size, 2.0 * size * flows, 2.0 * size * weight.requires_grad)


def _trained(module: nn.Module | None) -> bool:
    return module is not None and any(parameter.requires_grad for parameter in module.parameters())


def _palm_params(model: Decoder) -> float:
    head = model.config.vocab_size * model.config.hidden_size if model.output_head is not None else 0
    apart = {id(model.embedding.weight)} | ({id(model.output_head.weight)} if model.output_head is not None else set())
    count = float(head + sum(p.numel() for p in model.parameters() if id(p) not in apart))
    for module in model.modules():
        if isinstance(module, MoE):
            idle = 1 - module.top_k / module.count
            count -= idle * sum(parameter.numel() for parameter in module.experts.parameters())
    return count
