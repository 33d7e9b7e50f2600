"""Write tests/golden/operation_counts.json: what a step of a tiny model launches, computes and writes. `make golden`.

Speed cannot be tested by time on a shared machine, but most of what makes a step slower shows as more work: a matmul
done twice, a copy, a cast, a kernel where several were one. So one optimizer step of a PolicyRank is run under a mode
that sees every operation after autograd: operations that are not views, matmuls and their FLOPs (torch's own formulas),
and bytes that their results take.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from posttrain import storage
from posttrain.compute.collective import MeetingPoint
from posttrain.compute.mesh import Sizes
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.data.types import Pack
from posttrain.model.losses.dpo import DPOLoss
from posttrain.model.losses.policy_gradient import TruncatedLoss
from posttrain.model.losses.sft import SFTLoss
from posttrain.workflow.policy_rank import PolicyRank
from tiny import tiny_model
from tiny_training import TRAINING

GOLDEN = Path(__file__).parent / "golden" / "operation_counts.json"
LENGTHS = (40, 23, 31, 22, 12, 50, 41, 19)
"""Of the documents of a step: two packs of three to five."""
CASES: dict[str, dict[str, Any]] = {
    "sft": {},
    "sft, bfloat16 beside masters": {"precision": "bfloat16"},
    "sft, bfloat16 rounded stochastically": {"precision": "bfloat16_stochastic"},
    "sft, activations recomputed": {"activation_checkpointing": "full"},
    "dpo": {"loss": DPOLoss(beta=0.1)},
    "grpo": {"loss": TruncatedLoss(importance_cap=2.0, temperature=1.0)},
}


class Operations(TorchDispatchMode):
    """Counts what runs below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.matmuls, self.written = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False) and func is not torch.ops.aten.detach.default:
            self.operations += 1
            self.matmuls += func.overloadpacket in MATMULS
            made = found if isinstance(found, tuple | list) else (found,)
            self.written += sum(each.numel() * each.element_size() for each in made if isinstance(each, torch.Tensor))
        return found


MATMULS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)


def counts(case: dict[str, Any]) -> dict[str, int]:
    """Of the second step of a case; the first makes the optimizer's moments."""
    settings = dict(case)
    loss = settings.pop("loss", SFTLoss())
    with tempfile.TemporaryDirectory() as folder:
        storage.publish(tiny_model(Path(folder, "made")), uri := str(Path(folder, "model")))
        one = {"rank": 0, "sizes": Sizes(data=1), "model_uri": uri, "backend": "posttrain"}
        rank = PolicyRank(**one, training=replace(TRAINING, pack_tokens=128, **settings), reference=False)
        rank.meeting = MeetingPoint("127.0.0.1")
        rank.join(rank.meeting.address, 60.0)
    packs = documents()
    rank.train_step(0, packs, loss, 200.0)
    seen, flops = Operations(), FlopCounterMode(display=False)
    with flops, seen:
        rank.train_step(1, packs, loss, 200.0)
    return {
        "operations": seen.operations,
        "matmuls": seen.matmuls,
        "flops": flops.get_total_flops(),
        "bytes_written": seen.written,
    }


def documents() -> list[Pack]:
    """Pairs of documents with every column that a loss of CASES reads."""
    rng, samples = np.random.default_rng(0), []
    for length in LENGTHS:
        columns = {name: rng.normal(-5.0, 1.0, length + 1).tolist() for name in ("sampler_logprobs", "advantages")}
        sample = shift(rng.integers(0, 200, length + 1), np.ones(length + 1), **columns)
        sample.fields["ref_logprob"] = -5.0 * length
        samples.append(sample)
    return pack(list(zip(samples[::2], samples[1::2], strict=True)), pack_tokens=128)


def graphs(step: Callable[[int], None], *, warm: int, more: int) -> tuple[int, int]:
    """Graphs that torch.compile has made after the first `warm` steps, and after `more` steps that follow."""
    from torch._dynamo.utils import counters

    for number in range(warm):
        step(number)
    first = counters["stats"]["unique_graphs"]
    for number in range(warm, warm + more):
        step(number)
    return first, counters["stats"]["unique_graphs"]


def document() -> str:
    """The text of GOLDEN."""
    torch.set_num_threads(1)
    found = {name: counts(case) for name, case in CASES.items()}
    return json.dumps({"torch": torch.__version__.split("+")[0], "cases": found}, indent=2) + "\n"


if __name__ == "__main__":
    GOLDEN.write_text(document())
