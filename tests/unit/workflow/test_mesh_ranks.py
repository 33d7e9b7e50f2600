"""Policy ranks on a mesh, without Ray: they take one rank's steps, with adapters too, and resume on another mesh."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from policy_ranks import MODEL, Job, run
from posttrain import storage
from posttrain.compute.weight_sync import digest
from tiny_families import random_model

QUICK: dict[str, dict[str, Any]] = {
    "one": {"sizes": {"data": 1}},
    "context": {"sizes": {"data": 1, "context": 2}},
    "one lora": {"sizes": {"data": 1}, "lora": True, "export": "alone"},
    "tensor lora": {"sizes": {"data": 1, "tensor": 2}, "lora": True, "export": "together"},
}
SLOW: dict[str, dict[str, Any]] = {
    "one dpo": {"sizes": {"data": 1}, "loss": "dpo"},
    "context dpo": {"sizes": {"data": 1, "context": 2}, "loss": "dpo"},
    "one lora dpo": {"sizes": {"data": 1}, "lora": True, "loss": "dpo"},
    "tensor lora dpo": {"sizes": {"data": 1, "tensor": 2}, "lora": True, "loss": "dpo"},
    "narrow lora": {"sizes": {"data": 1, "context": 2}, "lora": True, "precision": "bfloat16"},
    "first half": {"sizes": {"data": 1, "context": 2}, "steps": (0, 2), "save": "saved"},
    "second half": {"sizes": {"data": 1}, "steps": (2, 3), "restore": "saved"},
}
TOLERANCE = 1e-5
"""As in test_place.py; as a number too, since a margin is between sums of some 50 nats."""
LATER = 1e-4
"""After a first step of adapters: Adam takes it at full length in each element of b, whatever the size of its gradient,
so one that is all rounding goes another way, and from there a's gradients come."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("policy_mesh")


@pytest.fixture(scope="module")
def found(root: Path) -> Callable[[str], list[dict[str, Any]]]:
    """(job) -> what each of its ranks found; the jobs of a group are done in one go."""
    random_model(MODEL, root / "made", std=0.1)
    storage.publish(root / "made", str(root / "model"))

    @cache
    def of(quick: bool) -> dict[str, list[dict[str, Any]]]:
        group, jobs = QUICK if quick else SLOW, []
        for job in group.values():
            paths = {key: str(root / job[key]) for key in ("save", "restore", "export") if key in job}
            jobs.append(Job(model_uri=str(root / "model"), **job | paths))
        return dict(zip(group, run(jobs, root / f"found{quick}"), strict=True))

    return lambda name: of(name in QUICK)[name]


@pytest.mark.parametrize(
    "kind",
    ["", " lora", pytest.param(" dpo", marks=pytest.mark.slow), pytest.param(" lora dpo", marks=pytest.mark.slow)],
)
def test_ranks_of_a_mesh_take_the_steps_of_one(found, kind: str):
    (expected,) = found(f"one{kind}")
    for ours in found(f"tensor{kind}" if "lora" in kind else f"context{kind}"):
        assert ours["sharded"] and ours["held"] < expected["held"]
        after = TOLERANCE
        for step, theirs in zip(ours["metrics"], expected["metrics"], strict=True):
            assert step == pytest.approx(theirs, rel=after, abs=TOLERANCE)
            after = LATER if "lora" in kind else TOLERANCE
        torch.testing.assert_close(ours["logprobs"], expected["logprobs"], rtol=1e-4, atol=1e-4)
        for pack, theirs in zip(ours["document_logprobs"], expected["document_logprobs"], strict=True):
            assert pack == pytest.approx(theirs, rel=after)
        if "dpo" not in kind:
            assert ours["eval"] == pytest.approx(expected["eval"], rel=after)


def test_adapters_in_shards_are_published_merged_and_beside_the_model_as_whole_ones(found, root: Path):
    merged, adapters = (
        load_file(storage.fetch(str(root / "together")) / file)
        for file in ("model.safetensors", "adapter/adapter_model.safetensors")
    )
    ours, base = found("tensor lora")[0], load_file(storage.fetch(str(root / "model")) / "model.safetensors")
    assert ours["sharded"] and list(merged) == list(base)
    adapted = 0
    for name, weight in merged.items():
        assert torch.equal(weight, ours["weights"][name]), "what the generators get"
        a, b = (adapters.get(f"base_model.model.{name.replace('.weight', f'.lora_{part}.weight')}") for part in "AB")
        if a is None or b is None:
            assert torch.equal(weight, base[name])
            continue
        adapted += 1
        assert not torch.equal(weight, base[name])
        torch.testing.assert_close(weight, base[name] + 32 / 4 * b @ a)
    assert adapted == 2 * 7 and len(adapters) == 2 * adapted
    alone = load_file(storage.fetch(str(root / "alone")) / "model.safetensors")
    far = torch.cat([(merged[name] - alone[name]).abs().flatten() for name in alone])
    moved = torch.cat([(alone[name] - base[name]).abs().flatten() for name in alone])
    assert far.mean() < 0.01 * moved.mean()


def test_adapters_in_shards_are_sent_alone_whole_and_with_their_scaling(found, root: Path):
    rank, *others = found("tensor lora")
    adapters = load_file(storage.fetch(str(root / "together")) / "adapter/adapter_model.safetensors")
    assert set(rank["sent"]) == set(adapters) and not any(other["sent"] for other in others)
    for name, tensor in rank["sent"].items():
        assert torch.equal(tensor, adapters[name] * (32 / 4 if ".lora_B." in name else 1))
    assert rank["sent_digest"] == digest(rank["sent"].items())


@pytest.mark.slow
def test_adapters_of_a_sharded_bfloat16_model_are_trained_in_float32(found):
    steps = [step["loss"] for step in found("narrow lora")[0]["metrics"]]
    wide = [step["loss"] for step in found("one lora")[0]["metrics"]]
    assert steps == pytest.approx(wide, rel=0.02) and steps != wide
    assert found("narrow lora")[0]["held"] < found("one lora")[0]["held"]


@pytest.mark.slow
def test_a_checkpoint_of_ranks_that_share_tokens_goes_on_with_one(found):
    (half,) = found("second half")
    whole = found("one")[0]
    assert half["metrics"] == pytest.approx([pytest.approx(whole["metrics"][2], rel=TOLERANCE)])
    assert half["digests"] == whole["digests"][2:]
