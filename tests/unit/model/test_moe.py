"""Experts by one sorted, grouped matmul equal a loop over experts, and the load says where the rows went."""

import pytest
import torch

from posttrain.model.decoder import Decoder
from posttrain.model.families import decoder_config
from posttrain.model.moe import MoE, router_metrics
from tiny_families import random_config


def moe(family: str, **changes) -> MoE:
    torch.manual_seed(0)
    config = random_config(family, 4) | {"mlp_only_layers": [], "decoder_sparse_step": 1} | changes
    module = MoE(decoder_config(config))
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3)
    return module


def loop(module: MoE, x: torch.Tensor) -> torch.Tensor:
    """A token at a time, an expert at a time."""
    weights, experts = module.router.choose(x)
    rows = []
    for token, row, chosen in zip(x, weights, experts, strict=True):
        total = torch.zeros_like(token)
        for weight, number in zip(row, chosen, strict=True):
            mlps = module.experts
            hidden = mlps.gate_up_proj[number] @ token
            if mlps.gate_up_bias is not None:
                gate, up = (hidden + mlps.gate_up_bias[number]).chunk(2)
                gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
                total = total + weight * (
                    mlps.down_proj[number] @ ((up + 1) * gate * torch.sigmoid(1.702 * gate)) + mlps.down_bias[number]
                )
            else:
                gate, up = hidden.chunk(2)
                total = total + weight * (mlps.down_proj[number] @ (torch.nn.functional.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize(("family", "size"), [("qwen3_moe", "num_experts"), ("gpt_oss", "num_local_experts")])
@pytest.mark.parametrize("scale", [0.5, 20.0])
def test_output_and_gradients_equal_a_loop_over_experts(family, size, scale):
    module = moe(family, **{size: 4, "num_experts_per_tok": 2})
    x = torch.randn(23, module.router.in_features) * scale
    leaves = [x.requires_grad_(), *module.parameters()]
    got, expected = module(x), loop(module, x)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    upstream = torch.randn_like(expected)
    pairs = (torch.autograd.grad(each, leaves, upstream) for each in (got, expected))
    for mine, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4 * float(theirs.abs().max()) + 1e-5, rtol=1e-3)


def test_an_expert_that_takes_no_token_gets_a_zero_gradient():
    module = moe("gpt_oss", num_local_experts=4, num_experts_per_tok=1)
    with torch.no_grad():
        module.router.bias[:] = torch.tensor([100.0, 0.0, 0.0, 0.0])
    module(torch.randn(9, module.router.in_features)).sum().backward()
    gradient = module.experts.gate_up_proj.grad
    assert gradient[0].any() and not gradient[1:].any()
    assert module.load.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_the_metrics_of_the_load():
    layers = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    model = Decoder(decoder_config(random_config("gpt_oss", 0) | layers | {"num_local_experts": 4}))
    even, skewed = (layer.mlp for layer in model.layers)
    even.load.copy_(torch.full((4,), 0.25))
    skewed.load.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    found = {name: float(value) for name, value in router_metrics(model).items()}
    assert found == pytest.approx({"router/max_load": 4.0, "router/idle": 0.375, "router/entropy": 0.5})
    assert router_metrics(Decoder(decoder_config(random_config("llama", 0)))) == {}
