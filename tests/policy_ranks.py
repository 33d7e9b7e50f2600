"""Policy ranks in processes of their own, without Ray, on CPUs or on as many GPUs: what they compute, save and resume.

As a program: python policy_ranks.py FOLDER, where FOLDER/jobs.json holds the jobs, done one after another; rank r
leaves what it found in FOLDER/<number of the job>.<r>.pt.
"""

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain.compute.collective import MeetingPoint
from posttrain.compute.mesh import Sizes
from posttrain.data.pack import deal, pack
from posttrain.data.sample import shift
from posttrain.data.types import Pack
from posttrain.model.lora import LoRA
from posttrain.model.losses import count
from posttrain.model.losses.dpo import DPOLoss
from posttrain.model.losses.sft import SFTLoss
from posttrain.workflow.policy_model import Build
from posttrain.workflow.policy_rank import PolicyRank
from posttrain.workflow.training import Training
from saves import checkpoints

PACK_TOKENS, PACKS, VOCABULARY = 512, 4, 97
LOSSES = {"sft": SFTLoss(), "dpo": DPOLoss(beta=0.5)}
MODEL = {
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": PACK_TOKENS,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """Some steps of a training job on one mesh."""

    model_uri: str
    sizes: dict[str, int]
    steps: tuple[int, int] = (0, 3)
    """The first, and the one after the last."""
    loss: str = "sft"
    precision: str = "float32"
    lora: bool = False
    restore: str | None = None
    """Root of the checkpoints of which the newest is read first."""
    save: str | None = None
    """Root of checkpoints for one after the last step."""
    export: str | None = None
    training: dict[str, Any] = field(default_factory=dict)


def run(jobs: list[Job], folder: Path, *, timeout_s: float = 240.0) -> list[list[dict[str, Any]]]:
    """Of every job, what each rank found."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout_s)
    assert done.returncode == 0, done.stderr[-6000:]
    worlds = [Sizes(**job.sizes).world for job in jobs]
    return [[torch.load(folder / f"{n}.{rank}.pt") for rank in range(world)] for n, world in enumerate(worlds)]


def packs_of(step: int) -> list[Pack]:
    """A step's packs, of pairs of documents of unlike length that carry loss at their ends; in the second pack all
    loss is in its middle."""
    rng = np.random.default_rng(step)

    def document(length: int, trained: int):
        mask = np.arange(length + 1) > length - trained
        return shift(rng.integers(1, VOCABULARY, length + 1), mask * rng.uniform(0.5, 1, length + 1))

    pairs = [(document(n, 9), document(m, 5)) for n, m in rng.integers(60, 110, (2 * PACKS, 2))]
    found = pack(pairs, pack_tokens=PACK_TOKENS)
    middle = (document(200, 20), document(180, 20))
    return [found[0], Pack(samples=middle, num_units=1), *found[1 : PACKS - 1]]


def digest(each: Pack) -> str:
    """Of what a pack holds."""
    return hashlib.sha256(b"".join(sample.input_ids.tobytes() for sample in each.samples)).hexdigest()


def do(job: Job, rank: int, meeting: "MeetingPoint | str") -> dict[str, Any]:
    """What one rank of a job finds."""
    sizes = Sizes(**job.sizes)
    options: dict[str, Any] = {"num_steps": 20, "lr": 1e-3, "schedule": "constant", "warmup_steps": 0}
    options |= {"betas": (0.9, 0.95), "weight_decay": 0.1, "max_grad_norm": 1.0, "pack_tokens": PACK_TOKENS}
    training = Training(**options | job.training, precision=job.precision)
    build = Build(lora=LoRA(rank=4, targets=("all-linear",)) if job.lora else None)
    made = PolicyRank(
        rank=rank,
        sizes=sizes,
        model_uri=job.model_uri,
        backend="posttrain",
        training=training,
        reference=job.loss == "dpo",
        build=build,
    )
    if isinstance(meeting, MeetingPoint):
        made.meeting = meeting
    costs = made.join("" if isinstance(meeting, MeetingPoint) else meeting, 60.0)
    if job.restore is not None:
        newest = checkpoints(job.restore).latest()
        assert newest is not None, f"nothing under {job.restore}"
        made.restore(newest.uri)
    loss, found = LOSSES[job.loss], {"metrics": [], "digests": [], "sharded": made.sharded}
    first = packs_of(100)[:2]
    found["logprobs_before"] = made.engine.logprobs(made._batch(first[0]), temperature=1.0).cpu()
    for step in range(*job.steps):
        packs = packs_of(step)
        mine = deal(packs, ranks=sizes.data, cost=costs.of)[sizes.data_rank(rank)]
        assert len(mine) == PACKS // sizes.data, "ranks of a sharded model take as many packs each"
        metrics = made.train_step(step, mine, loss, count(loss, packs))
        found["metrics"].append({name: value for name, value in metrics.items() if not name.startswith("time/")})
        found["digests"].append([digest(each) for each in mine])
    found["logprobs"] = made.engine.logprobs(made._batch(first[0]), temperature=1.0).cpu()
    found["document_logprobs"] = made.document_logprobs(first)
    mine = deal(packs_of(100), ranks=sizes.data, cost=costs.of)[sizes.data_rank(rank)]
    if job.loss == "sft":  # whose loss reads no reference, which only train_step() makes
        found["eval"] = made.evaluate(mine, loss, count(loss, packs_of(100)))
    found["weights"] = {name: tensor.clone() for name, tensor in made.weights("float32").items()}
    if job.lora:
        found["sent"] = {name: tensor.clone() for name, tensor in made.weights("float32", "adapters").items()}
        found["sent_digest"] = made.weights_digest("float32", "adapters")
    found["held"] = sum(
        p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in made.engine.model.parameters()
    )
    if job.save is not None:
        made.begin_save(f"{job.save}.ranks")
        while (outcome := made.save_result()) is None:
            time.sleep(0.001)  # the thread of the snapshot is at work
        found |= {"report": outcome["report"], "shapes": {n: shape for n, (shape, _) in made.state_shapes().items()}}
    if job.export is not None:
        made.export(job.export)
    made.engine.ranks.close()
    return found


def be_rank(rank: int, folder: str, pipe: Any) -> None:
    """A process that takes part in every job that has its rank, one after another."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3").split(",")[rank]
    while (asked := pipe.recv()) is not None:
        number, job = asked
        meeting: MeetingPoint | str
        if rank == 0:
            meeting = MeetingPoint("127.0.0.1")
            pipe.send(meeting.address)
        else:
            meeting = pipe.recv()
        torch.compiler.reset()  # a process may compile a function only so many times
        try:
            torch.save(do(job, rank, meeting), f"{folder}/{number}.{rank}.pt")
        except Exception:
            pipe.send(traceback.format_exc())
            raise
        pipe.send("done")


def commit(job: Job, folder: str, number: int) -> None:
    """What the driver does once all ranks have written."""
    assert job.save is not None
    found = [torch.load(f"{folder}/{number}.{rank}.pt") for rank in range(Sizes(**job.sizes).world)]
    with checkpoints(job.save).writing() as saved:
        attempt = saved.begin(job.steps[1], 1)
        os.rename(f"{job.save}.ranks", attempt.folder)
        saved.commit(attempt, shapes=found[0]["shapes"], reports=[each["report"] for each in found], state={})


def answers(pipes: list[Any]) -> list[str]:
    """What all have sent, or as soon as one has an error, that: its peers wait for it in vain."""
    found: dict[int, str] = {}
    while len(found) < len(pipes) and all(each == "done" for each in found.values()):
        for pipe in multiprocessing.connection.wait([p for n, p in enumerate(pipes) if n not in found]):
            try:
                found[pipes.index(pipe)] = pipe.recv()
            except EOFError:
                found[pipes.index(pipe)] = "it died"
    return list(found.values())


def main(folder: str) -> None:
    jobs = [Job(**described) for described in json.loads(Path(folder, "jobs.json").read_text())]
    # Importing torch takes seconds, so forked where there is no CUDA, which does not survive a fork.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    pipes = []
    for rank in range(max(Sizes(**job.sizes).world for job in jobs)):
        ours, theirs = context.Pipe()
        context.Process(target=be_rank, args=(rank, folder, theirs), daemon=True).start()
        theirs.close()
        pipes.append(ours)
    for number, job in enumerate(jobs):
        start, taking_part = time.monotonic(), pipes[: Sizes(**job.sizes).world]
        for pipe in taking_part:
            pipe.send((number, job))
        address = pipes[0].recv()
        for pipe in taking_part[1:]:
            pipe.send(address)
        wrong = [answer for answer in answers(taking_part) if answer != "done"]
        if wrong:
            sys.exit(f"job {number}, {job}: {wrong[0]}")
        if job.save is not None:
            commit(job, folder, number)
        print(f"job {number}: {time.monotonic() - start:.1f} s", flush=True)
    for pipe in pipes:
        pipe.send(None)


if __name__ == "__main__":
    main(sys.argv[1])
