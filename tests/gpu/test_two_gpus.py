"""Two GPUs over NCCL: what tests/unit/workflow/test_mesh_ranks.py holds of CPU processes, with compiled kernels.

python -m pytest tests/gpu/test_two_gpus.py -m gpu
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from policy_ranks import MODEL, Job, run
from posttrain import storage
from tiny_families import random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

WIDE = {"precision": "float32"}
HALF = {"precision": "bfloat16", "training": {"deterministic": True}}
JOBS: dict[str, dict[str, Any]] = {
    "one": {"sizes": {"data": 1}, **WIDE},
    "tensor": {"sizes": {"data": 1, "tensor": 2}, **WIDE},
    "context": {"sizes": {"data": 1, "context": 2}, **WIDE},
    "data": {"sizes": {"data": 2}, **WIDE},
    "one narrow": {"sizes": {"data": 1}, **HALF},
    "two, first half": {"sizes": {"data": 2}, "steps": (0, 2), "save": "saved", **HALF},
    "one, second half": {"sizes": {"data": 1}, "steps": (2, 4), "restore": "saved", **HALF},
    "two narrow": {"sizes": {"data": 2}, "steps": (0, 4), **HALF},
    "one lora": {"sizes": {"data": 1}, "lora": True, **HALF},
    "tensor lora": {"sizes": {"data": 1, "tensor": 2}, "lora": True, "export": "exported", **HALF},
}
WIDE_TOLERANCE = 1e-4
"""Of metrics and log probabilities in float32: sums in another order, in kernels of another shape."""
NARROW_TOLERANCE = 1e-2
"""Of losses with bfloat16: each rank rounds its own part of a sum."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("two_gpus")


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, list[dict[str, Any]]]:
    """What each rank of every job found."""
    random_model(MODEL, root / "made", std=0.1)
    storage.publish(root / "made", str(root / "model"))
    jobs = []
    for job in JOBS.values():
        paths = {key: str(root / job[key]) for key in ("save", "restore", "export") if key in job}
        jobs.append(Job(model_uri=str(root / "model"), **job | paths))
    return dict(zip(JOBS, run(jobs, root / "found", timeout_s=1500.0), strict=True))


@pytest.mark.parametrize("mesh", ["tensor", "context", "data"])
def test_two_ranks_take_the_steps_of_one(found, mesh: str):
    (expected,) = found["one"]
    for ours in found[mesh]:
        assert ours["sharded"] and ours["held"] < 0.7 * expected["held"]
        for step, theirs in zip(ours["metrics"], expected["metrics"], strict=True):
            compared = {name: value for name, value in theirs.items() if name in ("loss", "entropy", "grad_norm", "lr")}
            assert {name: step[name] for name in compared} == pytest.approx(compared, rel=WIDE_TOLERANCE)
        torch.testing.assert_close(ours["logprobs"], expected["logprobs"], rtol=0, atol=1e-3)
        assert ours["eval"]["loss"] == pytest.approx(expected["eval"]["loss"], rel=WIDE_TOLERANCE)


@pytest.mark.parametrize("mesh", ["tensor", "context", "data"])
def test_logprobs_before_the_first_step_are_those_of_one_rank(found, mesh: str):
    (expected,) = found["one"]
    for ours in found[mesh]:
        torch.testing.assert_close(ours["logprobs_before"], expected["logprobs_before"], rtol=0, atol=1e-4)


def test_a_checkpoint_of_two_ranks_goes_on_with_one_over_the_same_batches(found):
    (half,), two = found["one, second half"], found["two narrow"]
    for number, step in enumerate(half["metrics"]):
        whole = sorted(digest for rank in two for digest in rank["digests"][2 + number])
        assert sorted(half["digests"][number]) == whole
        assert step["loss"] == pytest.approx(two[0]["metrics"][2 + number]["loss"], rel=NARROW_TOLERANCE)
    before = found["two, first half"][0]["weights"]
    for name, weight in found["two narrow"][0]["weights"].items():
        assert weight.shape == before[name].shape and torch.isfinite(weight).all()


def test_adapters_in_shards_train_and_are_published(found, root: Path):
    ours, theirs = ([step["loss"] for step in found[name][0]["metrics"]] for name in ("tensor lora", "one lora"))
    assert ours == pytest.approx(theirs, rel=NARROW_TOLERANCE)
    merged = load_file(storage.fetch(str(root / "exported")) / "model.safetensors")
    for name, weight in merged.items():
        assert torch.equal(weight.float(), found["tensor lora"][0]["weights"][name])
