"""The estimate of memory is what torch keeps: the partitioner's own saved set when compiled, autograd's own when not.

The oracle of a compiled block is the graph that torch's min-cut partitioner leaves for the backward, traced on the
meta device with the GPU's way to stack weights; that of an uncompiled one are the tensors that autograd packs.
"""

from functools import partial

import pytest
import torch
from torch._dynamo import reset
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from posttrain.model import attention, layers
from posttrain.model.activations import Saving, saved_bytes, selective_bytes, stacked_bytes
from posttrain.model.attention import Layout
from posttrain.model.attention_flash import segments
from posttrain.model.build import fresh_config
from posttrain.model.decoder import Block, Decoder
from posttrain.model.families import decoder_config
from posttrain.model.lora import LoRA, add_lora
from posttrain.model.memory import GIB, Memory, Setup, active_parameters, memory
from posttrain.model.rope import rope_tables
from tiny_families import FAMILIES, random_config

T = 4093
"""A prime, so that no size of a weight is a multiple of it."""
SLOW = partial(pytest.param, marks=pytest.mark.slow)
"""Each compiles for seconds; the others of its kind differ more."""
VIEWS = {"view", "alias", "permute", "transpose", "slice", "unsqueeze", "squeeze", "expand", "t", "_unsafe_view"}
QWEN3_1_7B = fresh_config(
    vocab_size=151936, hidden_size=2048, num_layers=28, num_heads=16, num_kv_heads=8, mlp_size=6144, max_length=40960
) | {"head_dim": 128}


def source(node):
    """The node whose storage a view shows."""
    while node.op == "call_function":
        name = node.target.__name__.split(".")[0]
        if name == "getitem" and node.args[0].target.__name__.split(".")[0] in ("split", "split_with_sizes", "chunk"):
            node = node.args[0].args[0]
        elif name in VIEWS:
            node = node.args[0]
        else:
            return node
    return node


def kept_by_the_compiler(block: Block, config, dtype=torch.bfloat16) -> tuple[int, int]:
    """Bytes of activations, and of copies of weights, that the compiled forward hands to the backward."""
    found: list[tuple[int, int]] = []

    def forward(graph, inputs):
        output = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        sources = {source(node) for node in output[1:] if hasattr(node, "meta")}
        values = [(node, node.meta["val"]) for node in sources if isinstance(node.meta.get("val"), torch.Tensor)]
        of_tokens = [
            value
            for node, value in values
            if value.numel() and value.numel() % T == 0 and T in lengths(value)
            if node.op != "placeholder" or value.ndim < 4  # the positions' tables are all blocks' own
        ]
        weights = [v for node, v in values if node.op == "call_function" and T not in lengths(v) and v.ndim > 1]
        found.append((sum(v.nbytes for v in of_tokens), sum(v.nbytes for v in weights)))
        return graph.forward

    def lengths(value):
        return {size if size % T else T for size in value.shape if size}

    def backend(graph, inputs):
        return aot_module_simplified(
            graph,
            inputs,
            fw_compiler=forward,
            bw_compiler=lambda graph, _: graph.forward,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )

    reset()
    with torch.device("meta"):
        x = torch.empty(T, config.hidden_size, dtype=dtype, requires_grad=True)
        tables = [torch.empty(T, 1, parts, config.head_dim // 2, dtype=dtype) for parts in (1, 2)]
        ids, starts = torch.zeros(T, dtype=torch.int64), torch.zeros(5, dtype=torch.int32)
    longest = torch.tensor(100, device="cpu")
    where = {"doc_id": ids, "position_ids": ids, "cu_seqlens": starts, "longest": longest}
    layout = Layout(backend="varlen", segments=(segments(starts, (0, T)),), **where)
    torch.compile(block, backend=backend, fullgraph=True, dynamic=False)(x, *tables, layout)
    return found[0]


def block_of(family: str, seed: int, **changes) -> tuple[Block, object]:
    config = decoder_config(random_config(family, seed) | changes)
    with torch.device("meta"):
        return Block(config, 0).to(torch.bfloat16), config


@pytest.fixture
def stacking(monkeypatch):
    monkeypatch.setattr(layers, "joint", layers.stacked)
    monkeypatch.setattr(attention, "joint", layers.stacked)


SAVING = Saving(width=2, flex=False)


@pytest.mark.parametrize("family", [SLOW(each) if each in ("mistral", "qwen2") else each for each in FAMILIES])
def test_a_compiled_block_keeps_what_the_partitioner_keeps(stacking, family):
    block, config = block_of(family, 1, **({"decoder_sparse_step": 1} if "moe" in family else {}))
    kept, weights = kept_by_the_compiler(block, config)
    assert saved_bytes(config, block, SAVING) * T == pytest.approx(kept, rel=0.01)
    assert stacked_bytes(block, SAVING) == weights


@pytest.mark.parametrize("targets", ["q_proj v_proj", SLOW("all-linear"), SLOW("gate_proj")])
def test_adapters_keep_only_what_their_gradients_read(stacking, targets):
    block, config = block_of("qwen3", 0)
    add_lora(block, LoRA(rank=4, targets=tuple(targets.split())), seed=0)
    kept, weights = kept_by_the_compiler(block, config)
    assert saved_bytes(config, block, SAVING) * T == pytest.approx(kept, rel=0.01)
    assert stacked_bytes(block, SAVING) == weights


@pytest.mark.parametrize("shape", [(1024, 16, 3072), SLOW((2048, 16, 6144)), SLOW((2560, 32, 9728))], ids=str)
def test_half_a_memory_budget_keeps_no_more_than_the_matmuls(stacking, shape):
    names = ("hidden_size", "num_attention_heads", "intermediate_size")
    more = {"num_key_value_heads": 8, "head_dim": 128}
    config = decoder_config(QWEN3_1_7B | dict(zip(names, shape, strict=True)) | more)
    with torch.device("meta"):
        block = Block(config, 0).to(torch.bfloat16)
    with functorch_config.patch(activation_memory_budget=0.5):
        kept, _ = kept_by_the_compiler(block, config)
    assert kept <= selective_bytes(config, block, SAVING) * T <= 1.17 * kept


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_uncompiled_block_keeps_what_autograd_packs(family, dtype):
    config = decoder_config(random_config(family, 2))
    block = Block(config, 0).to(dtype)
    tokens, storages = 512, {}
    ids = torch.arange(tokens)
    where = {"doc_id": torch.zeros_like(ids), "position_ids": ids, "longest": torch.tensor(tokens)}
    layout = Layout(backend="sdpa", cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32), **where)
    rope = config.ropes[0]
    tables = [each.to(dtype) for each in rope_tables(rope, ids, torch.tensor(rope.frequencies))]
    own = {each.untyped_storage().data_ptr() for each in (*block.parameters(), *tables)}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own and tensor.is_floating_point():
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(torch.randn(tokens, config.hidden_size, dtype=dtype, requires_grad=True), *tables, layout)
    assert out.requires_grad
    estimate = saved_bytes(config, block, Saving(width=dtype.itemsize, compiled=False, flex=False)) * tokens
    assert estimate == pytest.approx(sum(storages.values()), rel=0.10)


def decoder(hf=QWEN3_1_7B) -> Decoder:
    with torch.device("meta"):
        return Decoder(decoder_config(hf))


def test_the_estimate_is_what_an_h200_measured():
    """benchmarks/results/decoder.json: 1.7 B, T 16,384, bfloat16 weights without an optimizer, peak 36.24 GiB."""
    found = memory(decoder(), Setup(pack_tokens=16_384))
    assert (found.tensors - found.optimizer) / GIB == pytest.approx(36.24, rel=0.02)


def test_states_take_their_bytes_a_parameter():
    model = decoder()
    count = sum(parameter.numel() for parameter in model.parameters())
    per = {"float32": (4, 4, 8), "bfloat16": (2, 4, 12), "bfloat16_stochastic": (2, 2, 4)}
    for precision, (weights, gradients, optimizer) in per.items():
        found = memory(model, Setup(pack_tokens=65_536, micro_batches=2, precision=precision))
        assert (found.weights, found.optimizer) == (weights * count, optimizer * count)
        assert found.gradients == pytest.approx(gradients * count, rel=0.05)


def test_each_way_to_save_saves():
    model, usual = decoder(), Setup(pack_tokens=16_384, micro_batches=2)
    whole = memory(model, usual)
    modes = [memory(model, Setup(pack_tokens=16_384, micro_batches=2, activation_checkpointing=m)) for m in MODES]
    assert modes[0].total > modes[1].total > modes[2].total
    sharded = memory(model, Setup(pack_tokens=16_384, micro_batches=2, data=8))
    assert sharded.optimizer == pytest.approx(whole.optimizer * 8 / 12 / 8), "the shards are the masters"
    assert sharded.communication > 0 and sharded.activations == whole.activations
    halves = memory(model, Setup(pack_tokens=16_384, micro_batches=2, context=2))
    keys = 28 * 2 * 2 * 8 * 128 * 8192  # of 28 layers, in bfloat16, keys and values of 8 heads: the other rank's tokens
    assert halves.activations - keys == pytest.approx(whole.activations / 2, rel=0.06), "stacked weights stay whole"
    assert halves.optimizer == pytest.approx(whole.optimizer * 8 / 12 / 2), "shards, as of data ranks"
    assert memory(model, Setup(pack_tokens=16_384, micro_batches=2, tensor=2)).weights < 0.65 * whole.weights


MODES = ("none", "selective", "full")


def test_frozen_parameters_are_weights_alone():
    model = decoder()
    add_lora(model, LoRA(rank=8, targets=("all-linear",)), seed=0)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    found = memory(model, Setup(pack_tokens=16_384))
    assert found.optimizer == 12 * trained
    model.requires_grad_(False)
    model.norm.requires_grad_(True)
    assert memory(model, Setup(pack_tokens=16_384)).activations < 1 * GIB, "no block has a backward"


def test_one_micro_batch_needs_no_gradients_beside_activations():
    model = decoder()
    one, two = (memory(model, Setup(pack_tokens=16_384, micro_batches=count)) for count in (1, 2))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert two.total - one.total == pytest.approx(4 * count * 1.03, rel=0.1)
    short = memory(model, Setup(pack_tokens=16))
    assert short.moment == "the end of the backward"


def test_experts_are_shared_and_met_by_their_share():
    config = random_config("qwen3_moe", 1) | {"decoder_sparse_step": 1, "mlp_only_layers": []}
    model = decoder(config)
    whole, shared = (memory(model, Setup(pack_tokens=64, expert=n)).weights for n in (1, 2))
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert whole - shared == 2 * experts / 2
    assert active_parameters(model) < sum(p.numel() for p in model.parameters())


def test_parts_add_up():
    found = memory(decoder(), Setup(pack_tokens=16_384, reference=True, generators=1, data=2, micro_batches=2))
    assert isinstance(found, Memory) and all(found.parts().values())
    assert found.total == sum(found.parts().values()) == found.tensors + found.overhead
