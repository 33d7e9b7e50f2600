"""How a decoder is split over ranks: which parameter is cut where, which modules then speak to whom, what cannot be.

Tensor parallelism is Megatron's (arXiv:1909.08053, section 3) and stays inside blocks: q, k, v, gate and up are cut
by rows, so that each rank has whole heads and columns of its own; o and down by columns, their outputs summed. A
layer's experts are dealt out whole. What is outside blocks is left whole, as FSDP shards it over all ranks; instead
each rank of a tensor group scores a share of the rows that carry loss (forward.py). Context parallelism cuts no
parameter, but the tokens of a batch.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from posttrain.model.attention import Attention
from posttrain.model.collectives import Group
from posttrain.model.decoder import Decoder
from posttrain.model.families import DecoderConfig
from posttrain.model.layers import MLP, Linear, RMSNorm
from posttrain.model.lora import Adapter
from posttrain.model.moe import MoE


def unfit(config: DecoderConfig, *, tensor: int, expert: int = 1, dora: bool = False) -> list[str]:
    """Why a model cannot be split over so many ranks, a line a reason; empty where it can."""
    if expert > 1:
        return _unfit_experts(config, tensor=tensor, expert=expert)
    if tensor == 1:
        return []
    counts = {"query heads": config.num_heads, "key and value heads": config.num_kv_heads}
    if config.experts is None or not all(config.experts.layers):
        counts["columns of its MLP"] = config.mlp_size
    if config.experts is not None:
        counts["experts"] = config.experts.count
    problems = [
        f"parallel.tensor = {tensor} does not divide the model's {count} {what}; choose a divisor"
        for what, count in counts.items()
        if count % tensor
    ]
    if dora:
        problems.append("DoRA needs the norms of whole rows, which parallel.tensor > 1 cuts; set one of them off")
    return problems


def _unfit_experts(config: DecoderConfig, *, tensor: int, expert: int) -> list[str]:
    if config.experts is None:
        return [f"parallel.expert = {expert} splits experts, and the model has none; set it to 1"]
    problems = []
    if config.experts.count % expert:
        count = config.experts.count
        problems.append(f"parallel.expert = {expert} does not divide the model's {count} experts; choose a divisor")
    if tensor > 1:
        problems.append("parallel.expert and parallel.tensor both deal out the experts; set one of them to 1")
    return problems


def expert_modules(model: Decoder) -> list[nn.Module]:
    """The modules whose parameters are the experts of a layer each."""
    return [module.experts for module in model.layers.modules() if isinstance(module, MoE)]


def split_experts(model: Decoder, expert: DeviceMesh) -> None:
    """Deal the experts of every layer out over an expert mesh, in place, whole ones in order."""
    group = Group.of(expert)
    if group is None:
        return
    for module in model.layers.modules():
        if isinstance(module, MoE):
            module.expert = group
            for name, _ in list(module.experts.named_parameters()):
                _place(module.experts, name, expert, 0)


def share_tokens(model: Decoder, context: DeviceMesh) -> None:
    """Let the ranks of a context mesh share the tokens of every batch, which must have its Share (data/context.py).

    No parameter is cut: FSDP shards over these ranks as over data ranks, whose gradients it sums alike.
    """
    model.context = Group.of(context)
    for module in model.layers.modules():
        if isinstance(module, Attention):
            module.context = model.context


def split(model: Decoder, tensor: DeviceMesh) -> None:
    """Cut the blocks of a decoder that fits (unfit()) over a tensor mesh, in place; adapters are there already.

    Parameters of blocks become DTensors, on the meta device or with values that are equal on all ranks.
    """
    group = Group.of(tensor)
    if group is None:
        return
    model.tensor = group
    for module in model.layers.modules():
        match module:
            case Attention():
                _split_attention(module, tensor)
                _by_columns(module.o_proj, tensor, group)
            case MLP():
                _by_rows(module.gate_proj, tensor)
                _by_rows(module.up_proj, tensor)
                _by_columns(module.down_proj, tensor, group)
            case MoE():
                module.experts.beside_others = True
                for name, _ in list(module.experts.named_parameters()):
                    _place(module.experts, name, tensor, 0)
            case _:
                continue
        module.tensor = group


def _split_attention(module: Attention, mesh: DeviceMesh) -> None:
    for linear in (module.q_proj, module.k_proj, module.v_proj):
        _by_rows(linear, mesh)
    for norm in (module.q_norm, module.k_norm):
        if isinstance(norm, RMSNorm):
            _place(norm, "weight", mesh, None)
            norm.partial = True
    if module.sinks is not None:
        _place(module, "sinks", mesh, 0)


def _by_rows(linear: Linear, mesh: DeviceMesh) -> None:
    """Each rank makes outputs of its own from the whole input."""
    _place(linear, "weight", mesh, 0)
    if linear.bias is not None:
        _place(linear, "bias", mesh, 0)
    _split_adapter(linear, mesh, whole="a", cut=("b", 0))


def _by_columns(linear: Linear, mesh: DeviceMesh, group: Group) -> None:
    """Each rank makes a part of every output's sum from inputs of its own; the bias is added once, to the sum."""
    _place(linear, "weight", mesh, 1)
    linear.sum_over = group
    _split_adapter(linear, mesh, whole="b", cut=("a", 1))


def _split_adapter(linear: Linear, mesh: DeviceMesh, *, whole: str, cut: tuple[str, int]) -> None:
    if linear.adapter is None:
        return
    adapter = linear.adapter
    assert isinstance(adapter, Adapter) and adapter.magnitude is None, "DoRA is refused by unfit()"
    _place(adapter, whole, mesh, None)
    _place(adapter, cut[0], mesh, cut[1])
    adapter.partial = (whole,)


def _place(module: nn.Module, name: str, mesh: DeviceMesh, dim: int | None) -> None:
    """Make a parameter a DTensor, cut along `dim` or, with None, whole on every rank; nothing is sent."""
    parameter = module.get_parameter(name)
    placement = Replicate() if dim is None else Shard(dim)
    made = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
    setattr(module, name, nn.Parameter(made, requires_grad=parameter.requires_grad))
