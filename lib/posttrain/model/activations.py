"""Bytes that a block's forward leaves for its backward: a pure function of its shape and of what is trained.

Compiled, as on GPUs, these are what the compiler's partitioner (min-cut, torch._functorch) keeps of the block's graph:
inputs and outputs of matmuls and of attention; norms, activation and rotation are made again from their inputs, but
a matmul's operand is kept. Uncompiled, every operation keeps what its own derivative reads. tests/unit/model/
test_memory.py holds both against what torch really keeps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from posttrain.model.decoder import Block
from posttrain.model.families import DecoderConfig
from posttrain.model.layers import MLP, Linear
from posttrain.model.lora import Adapter
from posttrain.model.moe import MoE


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What decides how much of a block is kept."""

    width: int
    """Bytes of a number of the computing dtype."""
    compiled: bool = True
    flex: bool = True
    """FlexAttention, else the flash kernels; they differ for sinks alone."""
    tensor: int = 1
    """Ranks that share heads and MLP."""


def saved_bytes(config: DecoderConfig, block: Block, saving: Saving) -> float:
    """Bytes a token that one block keeps, its own input included and without activation checkpointing."""
    b, hidden = saving.width, config.hidden_size
    heads, keys = config.num_heads / saving.tensor, config.num_kv_heads / saving.tensor
    queries, turned = heads * config.head_dim, (heads + keys) * config.head_dim
    attention = block.attention
    reads = [_reads_input(each) for each in (attention.q_proj, attention.k_proj, attention.v_proj)]
    kept = b * (queries + 2 * keys * config.head_dim + turned + queries) + 4 * heads  # projected, turned, output, lse
    kept += b * queries if config.sinks and saving.flex else 0  # before and after the sink took its share
    kept += sum(4 * each for each in (heads, keys)) if config.qk_norm else 0
    kept += b * 2 * hidden + 4 * 2  # the block's input and what attention adds to it; a scale for each norm
    kept += b * hidden if any(reads) else 0
    kept += b * _adapted_again((attention.q_proj, attention.k_proj, attention.v_proj)) / saving.tensor
    kept += b * hidden + 4 * 2 if config.sandwich_norms else 0
    kept += _mlp_bytes(config, block.mlp, saving)
    kept += sum(_adapter_ranks(block)) * b
    return kept if saving.compiled else kept + _eager_bytes(config, block, saving)


def selective_bytes(config: DecoderConfig, block: Block, saving: Saving) -> float:
    """Bytes a token with half the compiler's memory budget, at most: the block's input and its matmuls' outputs. Which
    of the small ones the compiler gives up is its knapsack's choice: up to a sixth less for Qwen3's shapes."""
    b, hidden = saving.width, config.hidden_size
    heads, keys = config.num_heads / saving.tensor, config.num_kv_heads / saving.tensor
    kept = b * (2 * hidden + (heads + 2 * keys) * config.head_dim) + 4 * 2
    kept += 4 * (heads + keys) if config.qk_norm else 0
    kept += b * hidden + 4 * 2 if config.sandwich_norms else 0
    if isinstance(block.mlp, MoE):
        return kept + b * block.mlp.top_k * (2 * _expert_size(config) / saving.tensor + hidden) + 32 * block.mlp.top_k
    return kept + b * 2 * config.mlp_size / saving.tensor


def working_bytes(config: DecoderConfig, block: Block, saving: Saving) -> float:
    """Bytes a token that a block's backward needs at once beside what was kept: the gradients of its widest part."""
    b, hidden = saving.width, config.hidden_size
    if isinstance(block.mlp, MoE):
        return b * (hidden + block.mlp.top_k * (2 * hidden + 3 * _expert_size(config) / saving.tensor))
    return b * (2 * hidden + 3 * config.mlp_size / saving.tensor)


def stacked_bytes(block: Block, saving: Saving) -> float:
    """Bytes of the stacked copy of a block's q, k and v weights, which the backward reads again: see layers.stacked();
    none on a CPU, where nothing is stacked."""
    attention = block.attention
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    return saving.width * sum(each.weight.numel() for each in linears) / saving.tensor if saving.compiled else 0.0


def _mlp_bytes(config: DecoderConfig, mlp: nn.Module, saving: Saving) -> float:
    b, hidden = saving.width, config.hidden_size
    if isinstance(mlp, MLP):
        size = config.mlp_size / saving.tensor
        kept = b * 2 * size
        kept += b * size if _reads_input(mlp.down_proj) else 0
        return kept + (b * hidden if _reads_input(mlp.gate_proj) or _reads_input(mlp.up_proj) else 0)
    assert isinstance(mlp, MoE), "a block has an MLP or experts"
    experts, size = mlp.experts, _expert_size(config) / saving.tensor
    row = b * (2 * size + hidden)  # projected, output
    row += b * hidden if experts.gate_up_proj.requires_grad else 0
    row += b * size if experts.down_proj.requires_grad else 0
    row += b + 8 * (4 if experts.gate_up_bias is not None else 3)  # its share, and numbers that sort it
    router = b * mlp.count if mlp.router.softmax_first else 0
    return mlp.top_k * row + router + (b * hidden if _reads_input(mlp.router) else 0)


def _eager_bytes(config: DecoderConfig, block: Block, saving: Saving) -> float:
    """What single operations keep beyond saved_bytes(): a norm its input in float32 and what it multiplies, the
    activation and its product both factors, and attention's output once more where heads are rearranged."""
    b, hidden = saving.width, config.hidden_size
    norm = (4 if b < 4 else 0) + (b if config.norm_cast_first or b == 4 else 4)
    turned = (config.num_heads + config.num_kv_heads) * config.head_dim
    more = norm * hidden * (4 if config.sandwich_norms else 2)
    # A cast, or residual's output, is not kept for itself; it is where the norm reads it as it is.
    more -= b * 2 * hidden if b < 4 else 0
    more += (norm + b) * turned - (b * turned if b < 4 else 0) if config.qk_norm else 0
    more += b * config.num_heads * config.head_dim
    # v is copied and its source freed; so are q and k where no norm reads them.
    more -= b * (config.num_kv_heads * config.head_dim if config.qk_norm else turned)
    size = config.mlp_size if not isinstance(block.mlp, MoE) else block.mlp.top_k * _expert_size(config)
    return more + b * size


def _adapted_again(linears: Sequence[Linear]) -> int:
    """Outputs of adapted Linears that stand beside the stacked output, which those without an adapter keep whole."""
    adapted = [each.out_features for each in linears if each.adapter is not None]
    return sum(adapted) if len(adapted) < len(linears) else 0


def _reads_input(linear: Linear) -> bool:
    """Whether the backward needs a Linear's input: for its weight's gradient or its adapter's."""
    return any(parameter.requires_grad for parameter in linear.parameters())


def _adapter_ranks(block: Block) -> list[int]:
    return [module.a.shape[0] for module in block.modules() if isinstance(module, Adapter)]


def _expert_size(config: DecoderConfig) -> int:
    assert config.experts is not None, "a MoE block has a config of experts"
    return config.experts.mlp_size
