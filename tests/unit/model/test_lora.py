"""An adapted Linear is PEFT's function, a fresh or removed adapter is none, and nothing else is trained."""

import math

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from posttrain.errors import ModelError
from posttrain.model.layers import MLP, Linear
from posttrain.model.lora import (
    LoRA,
    adapter_parameters,
    adapters,
    adapters_off,
    add_lora,
    merge_lora,
    merged_weight,
    reset_adapters,
    select,
    shortest_targets,
)

KINDS = {
    "lora": LoRA(rank=4, alpha=8, targets=("gate_proj", "down_proj")),
    "rslora": LoRA(rank=4, alpha=8, targets=("gate_proj", "down_proj"), rslora=True),
    "dora": LoRA(rank=4, alpha=8, targets=("gate_proj", "down_proj"), dora=True),
}


class Stack(nn.Module):
    """Two MLPs and a head over [T, 16]: every kind of name that a target may meet."""

    def __init__(self, *, bias: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(MLP(16, 24, activation="silu", bias=bias) for _ in range(2))
        self.output_head = Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.output_head(x)


def stack(*, bias: bool = False, dtype: torch.dtype = torch.float32) -> Stack:
    model = Stack(bias=bias)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(7, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


def disturb(model: nn.Module) -> None:
    """Give the adapters values as training would: no zeros, magnitudes off the norms."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


class OneLinear(nn.Module):
    """What PEFT wraps."""

    def __init__(self, linear: Linear):
        super().__init__()
        self.proj = nn.Linear(linear.in_features, linear.out_features)
        self.proj.load_state_dict({"weight": linear.weight, "bias": linear.bias})


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_linear_is_pefts_function_and_so_are_its_gradients(kind: str):
    lora, model = KINDS[kind], stack(bias=True)
    add_lora(model, lora, seed=0)
    disturb(model)
    _, ours, adapter = next(adapters(model))
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=8, target_modules=["proj"], use_rslora=lora.rslora, use_dora=lora.dora
    )
    theirs = peft.inject_adapter_in_model(config, OneLinear(ours)).proj
    pairs = [(adapter.a, theirs.lora_A["default"].weight), (adapter.b, theirs.lora_B["default"].weight)]
    if adapter.magnitude is not None:
        pairs.append((adapter.magnitude, theirs.lora_magnitude_vector["default"].weight))
    x, their_x = inputs().requires_grad_(), inputs().requires_grad_()
    with torch.no_grad():
        for mine, peers in pairs:
            peers.copy_(mine)
    y, their_y = ours(x), theirs(their_x)
    torch.testing.assert_close(y, their_y, atol=1e-5, rtol=1e-5)
    y.square().sum().backward()
    their_y.square().sum().backward()
    for mine, peers in [*pairs, (x, their_x)]:
        torch.testing.assert_close(mine.grad, peers.grad, atol=1e-5, rtol=1e-5)
    theirs.merge()
    torch.testing.assert_close(merged_weight(ours), theirs.get_base_layer().weight, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_no_bit(kind: str, dtype: torch.dtype):
    model = stack(dtype=dtype)
    before = model(inputs(dtype))
    add_lora(model, KINDS[kind], seed=0)
    assert torch.equal(model(inputs(dtype)), before)
    disturb(model)
    assert not torch.equal(model(inputs(dtype)), before)


def test_float32_adapters_on_bfloat16_weights_keep_the_models_dtype():
    model = stack(dtype=torch.bfloat16)
    before = model(inputs(torch.bfloat16))
    add_lora(model, KINDS["dora"], seed=0, dtype=torch.float32)
    assert {parameter.dtype for _, parameter in adapter_parameters(model)} == {torch.float32}
    after = model(inputs(torch.bfloat16))
    assert after.dtype == torch.bfloat16 and torch.equal(after, before)


def test_only_adapters_are_trained():
    model = stack(bias=True)
    assert add_lora(model, KINDS["dora"], seed=0) == [
        f"layers.{layer}.{name}" for layer in (0, 1) for name in ("gate_proj", "down_proj")
    ]
    model(inputs()).sum().backward()
    named = dict(adapter_parameters(model))
    assert len(named) == 12
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (name in named)
        assert name not in named or named[name] is parameter


@pytest.mark.parametrize("kind", KINDS)
def test_merging_keeps_the_function_and_frees_every_parameter(kind: str):
    model = stack(bias=True)
    names = [name for name, _ in model.named_parameters()]
    add_lora(model, KINDS[kind], seed=0)
    disturb(model)
    before = model(inputs())
    merge_lora(model)
    torch.testing.assert_close(model(inputs()), before, atol=1e-5, rtol=1e-5)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    add_lora(model, KINDS[kind], seed=0)  # and it can be adapted again


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_merge_is_rounded_once(kind: str):
    model = stack(dtype=torch.bfloat16)
    add_lora(model, KINDS[kind], seed=0)
    disturb(model)
    _, linear, adapter = next(adapters(model))
    exact = linear.weight.double() + 2 * adapter.b.double() @ adapter.a.double()
    if adapter.magnitude is not None:
        exact = exact * (adapter.magnitude / exact.norm(dim=1).bfloat16()).double()[:, None]
    merged = merged_weight(linear)
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact.bfloat16())


@pytest.mark.parametrize("bias", [False, True])
def test_without_its_adapters_the_model_is_the_base_bitwise(bias: bool):
    model = stack(bias=bias)
    base = model(inputs())
    add_lora(model, KINDS["dora"], seed=0)
    disturb(model)
    adapted = model(inputs())
    with adapters_off(model):
        assert torch.equal(model(inputs()), base)
        with adapters_off(model):
            assert torch.equal(model(inputs()), base)
        assert torch.equal(model(inputs()), base)
    assert torch.equal(model(inputs()), adapted)


def test_an_error_inside_adapters_off_puts_the_adapters_back():
    model = stack()
    add_lora(model, KINDS["lora"], seed=0)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
        raise RuntimeError("inside")
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def drawn(seed: int, lora: LoRA = KINDS["lora"], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model = stack(dtype=dtype)
    add_lora(model, lora, seed=seed)
    return {name: parameter.detach().clone() for name, parameter in adapter_parameters(model)}


def test_an_adapters_first_values_depend_on_seed_and_name_alone():
    torch.manual_seed(0)
    first = drawn(5)
    torch.manual_seed(1)
    again, other, low = drawn(5), drawn(6), drawn(5, dtype=torch.bfloat16)
    alone = drawn(5, LoRA(rank=4, alpha=8, targets=("layers.1.gate_proj",)))
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value.bfloat16(), low[name])
        assert torch.equal(value, other[name]) == name.endswith(".b")
    assert all(torch.equal(first[name], value) for name, value in alone.items())
    assert not torch.equal(first["layers.0.gate_proj.adapter.a"], first["layers.1.gate_proj.adapter.a"])
    a = torch.cat([value.flatten() for name, value in first.items() if name.endswith("gate_proj.adapter.a")])
    assert 0.9 / math.sqrt(16) < a.abs().max() <= 1 / math.sqrt(16)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_may_be_added_before_the_weights_exist(kind: str):
    loaded = stack()
    with torch.device("meta"):
        model = Stack()
    add_lora(model, KINDS[kind], seed=3)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    model.load_state_dict(loaded.state_dict(), strict=False)
    reset_adapters(model)
    add_lora(loaded, KINDS[kind], seed=3)
    for name, value in loaded.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_sharded_adapter_holds_its_part_of_the_same_values():
    whole = stack()
    add_lora(whole, KINDS["dora"], seed=3)
    wanted = dict(adapter_parameters(whole))
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        model = stack()
        add_lora(model, KINDS["dora"], seed=3)
        disturb(model)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        reset_adapters(model)
        for name, parameter in adapter_parameters(model):
            assert isinstance(parameter, DTensor)
            assert torch.equal(parameter.to_local(), wanted[name].chunk(2)[1])
    finally:
        dist.destroy_process_group()


def test_an_adapted_model_compiles_to_one_graph():
    model = stack()
    add_lora(model, KINDS["dora"], seed=0)
    disturb(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs()), model(inputs()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("targets", "count"),
    [(("gate_proj",), 2), (("layers.1.gate_proj",), 1), (("0.gate_proj", "up_proj"), 3), (("all-linear",), 6)],
)
def test_a_target_is_a_name_or_the_tail_of_one(targets: tuple[str, ...], count: int):
    assert len(add_lora(stack(), LoRA(targets=targets), seed=0)) == count


def test_a_target_that_matches_nothing_is_refused_and_the_model_left_alone():
    model = stack()
    with pytest.raises(ModelError, match=r'"gate_prj" \(did you mean "gate_proj"\?\).*it has down_proj, gate_proj, up'):
        add_lora(model, LoRA(targets=("gate_prj", "up_proj")), seed=0)
    with pytest.raises(ModelError, match=r'"_proj".* match no Linear'):  # a tail begins at a dot
        add_lora(model, LoRA(targets=("_proj",)), seed=0)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("targets", [("output_head",), ("up_proj", "heads.reward")])
def test_a_head_is_never_adapted(targets: tuple[str, ...]):
    with pytest.raises(ModelError, match="a head cannot be adapted"):
        add_lora(stack(), LoRA(targets=targets), seed=0)


def test_adapters_are_not_stacked():
    model = stack()
    add_lora(model, KINDS["lora"], seed=0)
    with pytest.raises(ModelError, match="has adapters already"):
        add_lora(model, KINDS["lora"], seed=0)


@pytest.mark.parametrize(
    "wrong",
    [{"rank": 0}, {"rank": 4.0}, {"alpha": 0.0}, {"alpha": math.nan}, {"targets": ()}, {"targets": "q_proj"}],
)
def test_a_value_that_makes_no_adapter_is_refused(wrong: dict):
    with pytest.raises(ModelError, match=f"LoRA {next(iter(wrong))} is"):
        LoRA(**wrong)


def test_scaling_is_alpha_over_rank_or_its_root():
    assert LoRA(rank=16, alpha=32).scaling == 2.0
    assert LoRA(rank=16, alpha=32, rslora=True).scaling == 8.0


def test_the_shortest_targets_select_exactly_what_was_chosen():
    names = ["layers.0.a", "layers.0.b", "layers.1.a", "layers.1.b"]
    assert shortest_targets(["layers.1.a", "layers.0.a"], names) == ("a",)
    assert shortest_targets(["layers.1.a"], names) == ("layers.1.a",)
    assert select(("layers.1.a", "0.b"), names) == ["layers.0.b", "layers.1.a"]
