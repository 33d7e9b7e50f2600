"""GPU memory of a training rank, before anything is built: a shape and the ways to train it become bytes by part.

The peak is the largest of four moments of a step: the LM head, when all blocks' activations are kept; the first block
of the backward; the end of the backward, when only gradients are; and the optimizer. Nothing here is fitted to a
measurement but the two constants of OVERHEAD; benchmarks/memory.py puts measured peaks beside the estimate.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import pairwise

from torch import nn

from posttrain.model.activations import Saving, saved_bytes, selective_bytes, stacked_bytes, working_bytes
from posttrain.model.decoder import Block, Decoder
from posttrain.model.head import CHUNK_ROWS
from posttrain.model.moe import MoE

GIB = 2**30
CONTEXT_BYTES = 0.6 * GIB
"""CUDA context, kernels and cuBLAS workspaces of a process: outside of what torch's allocator counts."""
FRAGMENTATION = 0.03
"""Share of the tensors' bytes that the caching allocator holds beyond them."""
ERROR = 0.10
"""What the estimate may be wrong by, as a share; a run is refused only beyond it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How a model is trained on one rank."""

    pack_tokens: int
    """T of a micro-batch."""
    loss_rows: int | None = None
    """Positions of a pack that the LM head reads; None is all."""
    micro_batches: int = 1
    """Packs of a rank in a step; with more than one, gradients wait while activations are kept."""
    precision: str = "bfloat16"
    """float32, bfloat16 (beside float32 masters) or bfloat16_stochastic."""
    activation_checkpointing: str = "none"
    """A mode of model/recompute.py."""
    data: int = 1
    """Ranks that share weights, gradients and moments by FSDP2."""
    tensor: int = 1
    """Ranks that share each block's heads and MLP."""
    context: int = 1
    """Ranks that share a pack's tokens."""
    expert: int = 1
    """Ranks that share the experts."""
    reference: bool = False
    """A frozen copy of the model beside it."""
    generators: int = 0
    """Copies of the model, in bfloat16, of generators on the same GPU; their caches of keys and values are not
    counted."""
    compiled: bool = True
    flex: bool = True
    """See activations.Saving."""

    @property
    def width(self) -> int:
        """Bytes of a number that the model computes with."""
        return 4 if self.precision == "float32" else 2

    @property
    def shards(self) -> int:
        """Ranks that FSDP2 shards over; those that share tokens are among them."""
        return self.data * self.context


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one GPU at its fullest moment, by part."""

    weights: float = 0.0
    """What the model computes with, or a rank's shards of it."""
    gradients: float = 0.0
    optimizer: float = 0.0
    """Moments, and float32 masters where the model computes in bfloat16."""
    activations: float = 0.0
    """Kept for the backward, with the stacked weights it reads again and the working set of one block."""
    head: float = 0.0
    """A chunk of logits, and gradients of the head's weight and input."""
    communication: float = 0.0
    """Blocks gathered by FSDP2, and a gradient before it is scattered."""
    reference: float = 0.0
    generator: float = 0.0
    overhead: float = 0.0
    """CUDA context and the allocator's slack."""
    moment: str = ""
    """Of the step, when the peak is reached."""

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.parts().values())

    @property
    def tensors(self) -> float:
        """All parts but the overhead: what torch.cuda.max_memory_allocated() is to say."""
        return self.total - self.overhead

    def parts(self) -> dict[str, float]:
        """Bytes by part, in this order."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "moment"}


def memory(model: Decoder, setup: Setup) -> Memory:
    """Bytes that training `model` takes of one GPU at the step's fullest moment.

    Args:
        model: on any device, the meta device too; its adapters, heads and what is frozen count as they stand.
    """
    sizes = _Sizes(model, setup)
    held = _held(sizes, setup)
    moments = [
        _at_the_head(model, sizes, setup),
        _at_the_last_block(model, sizes, setup),
        _at_the_end(sizes, setup),
        _at_the_optimizer(sizes, setup),
    ]
    peak = max((_added(held, moment) for moment in moments), key=lambda found: found.total)
    return replace(peak, overhead=CONTEXT_BYTES + FRAGMENTATION * peak.total)


class _Sizes:
    """Parameters on one rank: counts, after tensor and expert ranks took their share and before data ranks did."""

    def __init__(self, model: Decoder, setup: Setup):
        self.blocks = [_count(layer, setup) for layer in model.layers]
        self.trained_blocks = [_count(layer, setup, trained=True) for layer in model.layers]
        own = [each for name, each in model.named_parameters() if not name.startswith("layers.")]
        self.root = float(sum(each.numel() for each in own))
        self.trained_root = float(sum(each.numel() for each in own if each.requires_grad))
        self.all, self.trained = self.root + sum(self.blocks), self.trained_root + sum(self.trained_blocks)
        head = model.output_head
        self.head = float(head.weight.numel()) if head is not None else 0.0
        self.head_trained = head is not None and head.weight.requires_grad
        self.tied = head is not None and head.weight is model.embedding.weight


def _count(block: nn.Module, setup: Setup, *, trained: bool = False) -> float:
    count = 0.0
    for name, parameter in block.named_parameters():
        if trained and not parameter.requires_grad:
            continue
        share = setup.expert if ".experts." in f".{name}" else 1
        share *= setup.tensor if parameter.ndim > 1 and "router" not in name else 1
        count += parameter.numel() / share
    return count


def _held(sizes: _Sizes, setup: Setup) -> Memory:
    """What is there throughout a step."""
    ranks, width = setup.shards, setup.width
    sharded = setup.shards > 1 and setup.precision == "bfloat16"
    masters = sizes.trained if setup.precision == "bfloat16" and not sharded else 0.0
    # FSDP2 keeps float32 shards and casts as it gathers; a frozen parameter stays in the computing dtype.
    kept = 4 * sizes.trained + width * (sizes.all - sizes.trained) if sharded else width * sizes.all
    gathered = 0.0
    if setup.shards > 1:
        blocks = max((a + b for a, b in pairwise(sizes.blocks)), default=sizes.all - sizes.root)
        gathered = width * (sizes.root + blocks)
    return Memory(
        weights=kept / ranks,
        gradients=_gradient_width(setup) * sizes.trained / ranks if setup.micro_batches > 1 else 0.0,
        optimizer=(4 * masters + 2 * _gradient_width(setup) * sizes.trained) / ranks,
        communication=gathered,
        reference=width * sizes.all / ranks if setup.reference else 0.0,
        generator=2.0 * sizes.all * setup.tensor * setup.generators,
    )


def _at_the_head(model: Decoder, sizes: _Sizes, setup: Setup) -> Memory:
    """All activations are kept, and the head makes logits and gradients of a chunk."""
    b, d, rows = setup.width, model.config.hidden_size, _rows(setup)
    if model.output_head is None:
        rows = 0.0
    chunks = max(1, -(-rows // CHUNK_ROWS))
    logits = b * model.config.padded_vocab_size * rows / chunks if rows else 0.0
    return Memory(
        activations=_kept(model, setup) + _final_norm(model, setup),
        head=logits + 2 * b * d * rows + (b * sizes.head if sizes.head_trained else 0.0),
        moment="the LM head",
    )


def _at_the_last_block(model: Decoder, sizes: _Sizes, setup: Setup) -> Memory:
    """The backward has reached the last block, and all others still keep theirs."""
    saving, tokens = _saving(setup), setup.pack_tokens / setup.context
    working = max((working_bytes(model.config, layer, saving) for layer in _backward_blocks(model)), default=0.0)
    if setup.activation_checkpointing != "none":  # made again, to be read at once
        working += max((_remade(model, layer, setup) for layer in _backward_blocks(model)), default=0.0)
        working += _gathered(model, setup) / tokens
    block = max(sizes.trained_blocks, default=0.0)
    waits = sizes.tied and sizes.head_trained  # a tied gradient is whole only with the embedding's
    early = 0.0 if waits or not sizes.head_trained or setup.micro_batches > 1 else sizes.head
    return Memory(
        gradients=setup.width * block + _gradient_width(setup) * early / setup.shards,
        activations=_kept(model, setup) + working * tokens,
        head=setup.width * sizes.head if waits else 0.0,
        communication=_scattered(block, setup),
        moment="the backward of the last block",
    )


def _at_the_end(sizes: _Sizes, setup: Setup) -> Memory:
    """The embedding's gradient meets the head's; all others are there."""
    root = sizes.trained_root - (sizes.head if sizes.head_trained and not sizes.tied else 0.0)
    whole = 0.0 if setup.micro_batches > 1 else _gradient_width(setup) * sizes.trained / setup.shards
    return Memory(
        gradients=whole + (setup.width * root if setup.precision == "bfloat16" or setup.micro_batches > 1 else 0.0),
        head=setup.width * sizes.head if sizes.tied and sizes.head_trained else 0.0,
        communication=_scattered(root, setup),
        moment="the end of the backward",
    )


def _at_the_optimizer(sizes: _Sizes, setup: Setup) -> Memory:
    whole = 0.0 if setup.micro_batches > 1 else _gradient_width(setup) * sizes.trained / setup.shards
    return Memory(gradients=whole, moment="the optimizer")


def _kept(model: Decoder, setup: Setup) -> float:
    """Bytes that all blocks keep for the backward."""
    saving, tokens = _saving(setup), setup.pack_tokens / setup.context
    kept = 0.0
    for layer in _backward_blocks(model):
        match setup.activation_checkpointing:
            case "full":
                kept += setup.width * model.config.hidden_size * tokens
            case "selective":
                kept += selective_bytes(model.config, layer, saving) * tokens
            case _:
                kept += saved_bytes(model.config, layer, saving) * tokens + stacked_bytes(layer, saving)
                kept += _gathered(model, setup)
    return kept


def _gathered(model: Decoder, setup: Setup) -> float:
    """Bytes of the keys and values that a block has of other ranks' tokens."""
    a_token = 2 * setup.width * model.config.num_kv_heads / setup.tensor * model.config.head_dim
    return a_token * setup.pack_tokens * (1 - 1 / setup.context)


def _remade(model: Decoder, layer: Block, setup: Setup) -> float:
    """Bytes a token that one block's backward makes again."""
    saving = _saving(setup)
    kept = selective_bytes(model.config, layer, saving) if setup.activation_checkpointing == "selective" else 0.0
    once = stacked_bytes(layer, saving) * setup.context / setup.pack_tokens
    return max(0.0, saved_bytes(model.config, layer, saving) - kept) + once


def _final_norm(model: Decoder, setup: Setup) -> float:
    """The norm before the head is not compiled: it keeps float32 and normed values, and hands on its output."""
    return (4 + 2 * setup.width) * model.config.hidden_size * setup.pack_tokens / setup.context


def _backward_blocks(model: Decoder) -> Iterable[Block]:
    """Blocks that autograd goes through: from the first that is trained, or that what is trained lies below."""
    flows = model.embedding.weight.requires_grad
    for layer in model.layers:
        assert isinstance(layer, Block)
        flows = flows or any(parameter.requires_grad for parameter in layer.parameters())
        if flows:
            yield layer


def _saving(setup: Setup) -> Saving:
    return Saving(width=setup.width, compiled=setup.compiled, flex=setup.flex, tensor=setup.tensor)


def _rows(setup: Setup) -> float:
    return (setup.pack_tokens if setup.loss_rows is None else setup.loss_rows) / setup.context


def _gradient_width(setup: Setup) -> int:
    """Of moments too."""
    return 2 if setup.precision == "bfloat16_stochastic" else 4


def _scattered(parameters: float, setup: Setup) -> float:
    """A gradient before it is scattered, in float32, in which it is summed."""
    return 4 * parameters if setup.shards > 1 else 0.0


def _added(one: Memory, other: Memory) -> Memory:
    sums = {name: value + other.parts()[name] for name, value in one.parts().items()}
    return Memory(**sums, moment=other.moment)


def active_parameters(model: Decoder) -> float:
    """Parameters that a token meets: of experts those that it is sent to."""
    count = float(sum(parameter.numel() for parameter in model.parameters()))
    for module in model.modules():
        if isinstance(module, MoE):
            count -= (1 - module.top_k / module.count) * sum(each.numel() for each in module.experts.parameters())
    return count
