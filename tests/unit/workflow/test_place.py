"""A decoder on a mesh of real ranks is the decoder on one: losses, gradients, norms, and three steps of training."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gloo_ranks import launch
from posttrain.compute.collective import Ranks
from sharded_runs import run
from tiny_families import random_model

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
KINDS = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "dense": BASE | {"model_type": "llama", "mlp_bias": True, "attention_bias": True},
    "tied": BASE | {"model_type": "qwen3", "tie_word_embeddings": True},
    "experts": BASE | EXPERTS | {"model_type": "qwen3_moe", "mlp_only_layers": [0], "decoder_sparse_step": 1},
    "sinks": BASE
    | {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2}
    | {"layer_types": KINDS, "sliding_window": 5},
}
FAMILIES["lora"] = FAMILIES["dense"]
"""Of each, what another has not: biases; q and k norms and tied embeddings; experts; sinks, windows and both biases;
adapters, with all else frozen."""
FAMILIES["idle"] = FAMILIES["sinks"]
"""Its router chooses the first two experts, so that a rank which holds others sees no token."""
FAMILIES["lora_experts"] = FAMILIES["experts"]
"""Adapters beside frozen experts, which no target names."""
WITH_EXPERTS = ("experts", "sinks", "idle", "lora_experts")

MESHES = {
    "data4": {"data": 4},
    "data2_tensor2": {"data": 2, "tensor": 2},
    "data4_expert2": {"data": 4, "expert": 2},
    "context2_tensor2": {"data": 1, "context": 2, "tensor": 2},
    "data2_context2": {"data": 2, "context": 2},
    "context4": {"data": 1, "context": 4},
}
SLOW = ("data4", "context2_tensor2", "data2_context2", "context4")
CASES = [
    pytest.param(mesh, family, marks=pytest.mark.slow if mesh in SLOW else ())
    for mesh in MESHES
    for family in FAMILIES
    if (family in WITH_EXPERTS) >= ("expert" in mesh)
]

TOLERANCE = 1e-5
"""Largest difference, as a share of a tensor's largest element: some 80 roundings of float32. Sums over ranks, heads
and columns are taken in another order, and nothing else differs."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("families")
    made = {name: str(random_model(config, root / name, std=0.1)) for name, config in FAMILIES.items()}
    file = root / "idle" / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("router.bias"):
            tensor[:2] += 100
    save_file(tensors, file, metadata={"format": "pt"})
    return made


@pytest.fixture(scope="module")
def alone(folders) -> dict[str, Any]:
    """What one rank finds."""
    ranks = Ranks(rank=0, world_size=1, meeting="", timeout_s=1, device=torch.device("cpu"))
    return {
        name: run(ranks, folder, {}, losses_of(name), lora=name.startswith("lora")) for name, folder in folders.items()
    }


@pytest.fixture(scope="module")
def together(folders, tmp_path_factory) -> Callable[[str, str], list[dict[str, Any]]]:
    """(mesh, family) -> what each of four ranks finds; a mesh is launched once for all its families."""

    @cache
    def of(mesh: str) -> list[dict[str, Any]]:
        calls = [[name, folders[name], losses_of(name)] for at, name in (case.values for case in CASES) if at == mesh]
        return launch("sharded_runs:run_all", tmp_path_factory.mktemp(mesh), MESHES[mesh], calls)

    return lambda mesh, family: [rank[family] for rank in of(mesh)]


def losses_of(name: str) -> list[str]:
    return ["sft", "dpo", "reward"] if name in ("dense", "tied") else ["sft"]


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    largest = theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * largest + 1e-9)


@pytest.mark.parametrize(("mesh", "family"), CASES)
def test_a_mesh_computes_what_one_rank_computes(mesh: str, family: str, alone, together):
    expected, found = alone[family], together(mesh, family)[0]
    for name in ("logits", "logprobs", "entropy", "scores"):
        same(found[name], expected[name])


@pytest.mark.parametrize(("mesh", "family"), CASES)
def test_gradients_their_norm_and_metrics_are_those_of_one_rank(mesh: str, family: str, alone, together):
    for loss in losses_of(family):
        expected, found = alone[family][loss], together(mesh, family)[0][loss]
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=TOLERANCE)
        used = {name for name, value in found["gradient"].items() if value.any()}
        assert used == {name for name, value in expected["gradient"].items() if value.any()}
        for name in used:
            same(found["gradient"][name], expected["gradient"][name])
        same(found["norm"], expected["norm"])
        assert float(found["norm"]) > 0.1, "the test must clip"
        assert float(found["clipped"]) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize(("mesh", "family"), CASES)
def test_three_steps_lead_to_the_weights_of_one_rank(mesh: str, family: str, alone, together):
    expected, ranks = alone[family], together(mesh, family)
    for ours in ranks:
        for step, theirs in zip(ours["steps"], expected["steps"], strict=True):
            assert step == pytest.approx(theirs, rel=TOLERANCE)
    found = ranks[0]
    assert list(found["weights"]) == list(expected["weights"])
    for name, weight in expected["weights"].items():
        # Adam divides by the gradient's own size: where that is all rounding, a step's direction is too. lr is 1e-3.
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=2e-5)
    torch.testing.assert_close(found["logprobs_after"], expected["logprobs_after"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mesh", "family"), CASES)
def test_no_rank_holds_a_parameter_whole(mesh: str, family: str, alone, together):
    for name, whole in alone[family]["held"].items():
        sizes = [torch.Size(rank["held"][name]).numel() for rank in together(mesh, family)]
        assert max(sizes) < torch.Size(whole).numel() or whole[0] == 1, f"{name} is not sharded"
