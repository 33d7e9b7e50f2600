"""Of benchmarks/gpu_faults.py: one policy rank whose GPU is full in a step, and whose export is what it trained.

Another holder takes all but ROOM of the GPU's memory before the third step. The step must end with an error that says
what was asked and what would help; a new rank goes on from the checkpoint of the second step. What it exports then is
opened by transformers, which knows nothing of our decoder, and must give the loss that the rank measures.
"""

import gc
import re
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_fault_ranks import SAVED, STEPS, TRAINING, first_line, packs_of
from benchmarks.gpu_faults import model_folder, say
from posttrain.compute.checkpoint import Checkpoints
from posttrain.compute.collective import MeetingPoint
from posttrain.compute.mesh import Sizes
from posttrain.data.types import Pack
from posttrain.errors import ComputeError
from posttrain.model.losses import count
from posttrain.model.losses.sft import SFTLoss
from posttrain.workflow.policy_rank import PolicyRank

ROOM = 64 << 20
"""Bytes that are left; a step's activations are many times that."""
PACK_TOKENS = 4096
NEAR = {"cuda": 2e-2, "cpu": 1e-4}
"""Of a loss in nats: bfloat16 beside bfloat16 in kernels of another order, float32 beside float32."""


def packs_for(number: int, *, large: bool) -> list[Pack]:
    """A step's packs: of a size that a full GPU does not hold."""
    return packs_of(number, number=2, tokens=PACK_TOKENS if large else 512)


def rank_of(model_uri: str, *, large: bool) -> PolicyRank:
    """A rank without Ray."""
    training = replace(TRAINING, pack_tokens=PACK_TOKENS if large else 512)
    made = PolicyRank(
        rank=0, sizes=Sizes(data=1), model_uri=model_uri, backend="posttrain", training=training, reference=False
    )
    made.meeting = MeetingPoint("127.0.0.1")  # address() asks Ray
    made.join("", 60.0)
    return made


def step(rank: PolicyRank, number: int, *, large: bool) -> dict[str, float]:
    """One optimizer step; what must be the same in a run that goes on from a checkpoint."""
    packs = packs_for(number, large=large)
    found = rank.train_step(number, packs, SFTLoss(), count(SFTLoss(), packs))
    return {name: value for name, value in found.items() if name in ("loss", "grad_norm", "lr", "entropy")}


def save(rank: PolicyRank, kept: Checkpoints, done: int) -> str:
    """Commit a checkpoint, as the driver of a run does; its URI."""
    shapes = rank.state_shapes()
    attempt = kept.begin(done, sum(size for _, size in shapes.values()))
    rank.begin_save(attempt.folder)
    while (outcome := rank.save_result()) is None:
        time.sleep(0.01)
    tensors = {name: shape for name, (shape, _) in shapes.items()}
    return kept.commit(attempt, shapes=tensors, reports=[outcome["report"]], state={})


def full(model_uri: str, kept: Checkpoints) -> PolicyRank:
    """Fill the GPU before a step, see it named, and go on with a new rank; that rank after STEPS steps."""
    undisturbed = rank_of(model_uri, large=True)
    expected = [step(undisturbed, number, large=True) for number in range(STEPS)]
    del undisturbed
    rank = rank_of(model_uri, large=True)
    for number in range(SAVED):
        step(rank, number, large=True)
    uri = save(rank, kept, SAVED)
    give_back()
    taken = take_all()
    said, start = "no error", time.monotonic()
    try:
        step(rank, SAVED, large=True)
    except ComputeError as error:
        said = str(error)
    seconds = time.monotonic() - start
    named = re.search(r"step 3: out of GPU memory with 2 packs.*\n.*in use: .*\nplanned: .*\nFix: ", said)
    say(
        "gpu_full",
        passed=bool(named),
        happened=first_line(said),
        detected_s=round(seconds, 2),
        lost_steps=0,
    )
    del taken, rank
    give_back()
    rank = rank_of(model_uri, large=True)
    rank.restore(uri)
    again = [step(rank, number, large=True) for number in range(SAVED, STEPS)]
    equal = again == expected[SAVED:]
    gap = max(abs(new["loss"] - old["loss"]) for new, old in zip(again, expected[SAVED:], strict=True))
    how = "to the bit" if equal else f"with losses up to {gap:.2g} apart"
    say(
        "gpu_full_resume",
        passed=equal,
        happened=f"steps {SAVED + 1} to {STEPS} as those of a run that was left alone, {how}",
        lost_steps=0,
    )
    return rank


def take_all() -> list[torch.Tensor]:
    """Hold all of the GPU's memory but ROOM."""
    taken, size = [], 8 << 30
    while size >= 1 << 21:
        if torch.cuda.mem_get_info()[0] - ROOM < size:
            size //= 2
            continue
        try:
            taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:  # free, but not in one piece
            size //= 2
    return taken


def give_back() -> None:
    """Have the GPU's memory back that nothing in this process needs."""
    gc.collect()
    torch.cuda.empty_cache()


def exported(rank: PolicyRank, uri: str, *, large: bool) -> None:
    """Export, and compare with what the rank holds and computes."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    packs = packs_for(STEPS, large=large)
    ours = rank.evaluate(packs, SFTLoss(), count(SFTLoss(), packs))["loss"]
    rank.export(uri)
    files = load_file(Path(uri, "model.safetensors"))
    held = {name: tensor.detach().cpu() for name, tensor in rank.engine.weights()}
    same = all(torch.equal(files[name], held[name]) for name in files) and files.keys() <= held.keys()
    dtype = next(iter(held.values())).dtype
    torch.use_deterministic_algorithms(False)  # transformers uses kernels that have no such form
    theirs: Any = AutoModelForCausalLM.from_pretrained(uri, dtype=dtype, local_files_only=True)
    theirs.to(rank.device).eval()
    loss = mean_loss(theirs, packs, rank.device)
    near = abs(loss - ours) <= NEAR[rank.device.type]
    verified = rank.backend.verify(uri, uri)["max_abs_diff"]
    say(
        "export",
        passed=same and near,
        happened=f"{len(files)} tensors {'equal' if same else 'NOT equal'} to the bit; loss of transformers "
        f"{loss:.5f}, of the rank {ours:.5f}; float32 logits at most {verified:.1g} apart",
    )


@torch.no_grad()
def mean_loss(model: Any, packs: list[Pack], device: torch.device) -> float:
    """Nats per trained token, of transformers' own model, a document at a time."""
    total, tokens = 0.0, 0.0
    for sample in (sample for pack in packs for sample in pack.samples):
        ids, targets, mask = (
            torch.from_numpy(each).to(device) for each in (sample.input_ids, sample.target_ids, sample.loss_mask)
        )
        logits = model(ids.long()[None]).logits[0].float()
        losses = torch.nn.functional.cross_entropy(logits, targets.long(), reduction="none")
        total, tokens = total + float((losses * mask).sum()), tokens + float(mask.sum())
    return total / tokens


def main(gpus: int, folder: Path) -> None:
    """All cases; without a GPU the export alone."""
    model_uri = model_folder(folder / "model", gpus=gpus)
    with Checkpoints(str(folder / "checkpoints"), identity={}, keep=2).writing() as kept:
        if gpus:
            rank = full(model_uri, kept)
        else:
            rank = rank_of(model_uri, large=False)
            for number in range(STEPS):
                step(rank, number, large=False)
    exported(rank, str(folder / "exported"), large=bool(gpus))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(int(sys.argv[1]), Path(name))
