"""Products in float8 are the formulas' on rounded values, only blocks have them, and what cannot is refused."""

from functools import partial

import numpy as np
import pytest
import torch

from float8_formula import error, products
from posttrain.data.batch import collate
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.errors import ModelError
from posttrain.model import layers
from posttrain.model.decoder import Decoder
from posttrain.model.families import decoder_config
from posttrain.model.float8 import precision_on, states_of, tensorwise, unfit, use_float8
from posttrain.model.forward import loss_sum
from posttrain.model.layers import Linear, stacked
from posttrain.model.load import load_decoder
from posttrain.model.lora import LoRA, add_lora
from posttrain.model.losses.sft import SFTLoss
from posttrain.model.recompute import MODES
from tiny_families import random_config, random_model

WIDE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 97}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = random_config("qwen3", 0) | WIDE | {"intermediate_size": 96}
    return random_model(config, tmp_path_factory.mktemp("model"), std=0.05)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    (only,) = pack([(shift(rng.integers(1, 97, n).tolist(), [1.0] * n),) for n in (30, 20, 9)], pack_tokens=64)
    return collate(only, pack_tokens=64)


def loaded(folder, *, in_float8: bool) -> Decoder:
    model = load_decoder(folder, dtype=torch.bfloat16)
    if in_float8:
        use_float8(model)
    return model


def drawn(sizes=(48, 32), *, k=96, t=64):
    torch.manual_seed(0)
    x = (torch.randn(t, k) * 3).bfloat16().requires_grad_()
    weights = [(torch.randn(n, k) * 0.05 * (i + 1)).bfloat16().requires_grad_() for i, n in enumerate(sizes)]
    return x, weights, [torch.randn(t, n).bfloat16() * 1e-5 for n in sizes]


@pytest.mark.parametrize("sizes", [(48,), (48, 32)])
def test_products_and_gradients_are_those_of_rounded_operands(sizes):
    x, weights, grads = drawn(sizes)
    outputs, dx, dws = products(x.detach(), [each.detach() for each in weights], grads)
    got = tensorwise(x, weights)
    for mine, theirs in zip(got, outputs, strict=True):
        assert mine.dtype == torch.bfloat16 and error(mine, theirs) < 3e-3
    mine_x, *mine_w = torch.autograd.grad(got, [x, *weights], grads)
    assert error(mine_x, dx) < 3e-3
    assert max(error(mine, theirs) for mine, theirs in zip(mine_w, dws, strict=True)) < 3e-3
    exact = x.detach().double() @ weights[0].detach().double().T
    assert 0.01 < error(got[0], exact) < 0.05, "three bits of mantissa are lost, and no more"


def test_frozen_weights_and_inputs_get_no_gradient():
    x, weights, grads = drawn()
    _, dx, dws = products(x.detach(), [each.detach() for each in weights], grads)
    (mine,) = torch.autograd.grad(tensorwise(x, [each.detach() for each in weights]), x, grads)
    assert error(mine, dx) < 3e-3
    found = torch.autograd.grad(tensorwise(x.detach(), weights), weights, grads)
    assert max(error(mine, theirs) for mine, theirs in zip(found, dws, strict=True)) < 3e-3
    with torch.no_grad():
        assert not any(y.requires_grad for y in tensorwise(x, weights))


def test_zeros_stay_zero_and_what_is_not_finite_is_not_hidden():
    x, weights, _ = drawn((48,))
    assert not tensorwise(torch.zeros_like(x), weights)[0].any()
    for bad in (float("nan"), float("inf")):
        spoilt = x.detach().clone()
        spoilt[3, 5] = bad
        assert not tensorwise(spoilt, weights)[0][3].isfinite().any()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_only_linears_of_blocks_multiply_in_float8(tmp_path, family):
    config = random_config(family, 0) | WIDE | {"intermediate_size": 96, "decoder_sparse_step": 1}
    model = load_decoder(random_model(config, tmp_path), dtype=torch.bfloat16)
    before = {name: each.clone() for name, each in model.named_parameters()}
    use_float8(model)
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    linears = {name: each for name, each in model.named_modules() if isinstance(each, Linear)}
    found = {name for name, each in linears.items() if each.float8 is not None}
    assert found == {name for name in linears if name.rpartition(".")[2] in kinds}
    assert linears.keys() - found == {name for name in linears if name.endswith(("router", "output_head"))} != set()
    after = dict(model.named_parameters())
    assert all(torch.equal(after.pop(name), each) for name, each in before.items()) and not after


def test_a_stack_in_float8_adds_biases_and_adapters_to_each_part():
    torch.manual_seed(0)
    linears = [Linear(64, size, bias=True).bfloat16() for size in (32, 16)]
    for linear in linears:
        torch.nn.init.normal_(linear.weight)
        torch.nn.init.normal_(linear.bias)
        linear.float8 = tensorwise
    linears[1].adapter = lambda x, y, weight: 2 * y
    x = torch.randn(16, 64).bfloat16()
    bare = tensorwise(x, [each.weight for each in linears])
    first, second = stacked(x, linears)
    torch.testing.assert_close(first, bare[0] + linears[0].bias)
    torch.testing.assert_close(second, 2 * bare[1] + linears[1].bias)
    assert error(linears[1](x), second) < 0.05, "alone it has a scale of its own"


def gradients(model, batch):
    model.zero_grad()
    loss, _ = loss_sum(model, batch, SFTLoss())
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_decoder_in_float8_has_nearly_the_loss_and_gradients_of_bfloat16(folder, batch):
    loss, found = gradients(loaded(folder, in_float8=True), batch)
    expected, reference = gradients(loaded(folder, in_float8=False), batch)
    assert loss != expected and loss == pytest.approx(expected, rel=2e-2)
    assert found.keys() == reference.keys()
    for name, each in found.items():
        cosine = torch.cosine_similarity(each.double().flatten(), reference[name].double().flatten(), dim=0)
        assert cosine > 0.95, name


def test_adapters_train_over_float8_and_the_base_stays(folder, batch):
    model = loaded(folder, in_float8=True)
    add_lora(model, LoRA(rank=4), seed=0)
    _, found = gradients(model, batch)
    assert found and all(".adapter." in name for name in found)


def test_recomputed_activations_in_float8_give_the_same_bits(folder, batch):
    model = loaded(folder, in_float8=True)
    _, expected = gradients(model, batch)
    for mode in MODES[1:]:
        model.checkpoint_activations(mode)
        _, found = gradients(model, batch)
        assert all(torch.equal(each, expected[name]) for name, each in found.items()), mode


@pytest.mark.parametrize("trained", [True, False])
def test_a_module_in_float8_is_one_graph(folder, monkeypatch, trained):
    monkeypatch.setattr(layers, "joint", stacked)  # as on a GPU
    torch._dynamo.reset()
    mlp = loaded(folder, in_float8=True).requires_grad_(trained).layers[0].mlp
    x = torch.randn(64, 64).bfloat16()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x), mlp(x))


@pytest.mark.parametrize(
    ("changes", "tensor", "words"),
    [
        ({"hidden_size": 72}, 1, "the model's hidden size are 72 wide"),
        ({"intermediate_size": 96}, 4, "the model's MLP are 24 wide on a rank"),
        ({"head_dim": 20, "intermediate_size": 64}, 1, "the model's key and value heads are 40 wide"),
        ({"intermediate_size": 96}, 2, None),
    ],
)
def test_sides_that_are_no_multiples_of_16_are_refused(changes, tensor, words):
    with torch.device("meta"):
        model = Decoder(decoder_config(random_config("qwen3", 0) | WIDE | changes))
    if words is None:
        assert unfit(model.config, tensor=tensor) == []
        return
    assert any(words in line and "set optim.precision: bfloat16" in line for line in unfit(model.config, tensor=tensor))
    with pytest.raises(ModelError, match=words):
        use_float8(model, tensor=tensor)


def test_a_value_of_precision_names_the_states_and_the_products(monkeypatch):
    cpu, on = torch.device("cpu"), partial(precision_on, torch.device("cuda"))
    assert precision_on(cpu, "auto") == ("float32", False) and on("auto") == ("bfloat16", False)
    assert precision_on(cpu, "bfloat16_stochastic") == ("bfloat16_stochastic", False)
    assert states_of("float8_stochastic") == "bfloat16_stochastic"
    with pytest.raises(ModelError, match=r"needs a GPU of compute capability 8\.9 or higher, and this rank has none"):
        precision_on(cpu, "float8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ModelError, match=r"A100 has 8\.0; set optim\.precision: bfloat16"):
        on("float8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert on("float8") == ("bfloat16", True) and on("float8_stochastic") == ("bfloat16_stochastic", True)
