"""Of benchmarks/gpu_faults.py: two policy ranks over NCCL, in Ray's actors as in a run (gloo where there is no GPU).

Four steps with a checkpoint after the second; then rank 1 is stopped in the fifth, and the driver waits for its
deadline. New ranks go on from the checkpoint and must take the same steps to the bit. Then rank 1 is killed in a step.
"""

import asyncio
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_faults import model_folder, say
from posttrain.compute.checkpoint import Checkpoints
from posttrain.compute.cluster import Gang, ray_cluster
from posttrain.compute.mesh import Sizes
from posttrain.compute.pool import Pool
from posttrain.compute.weight_sync import digest
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.data.types import Pack
from posttrain.errors import ComputeError, WorkerDiedError, WorkerHungError
from posttrain.model.losses.sft import SFTLoss
from posttrain.workflow.clock import SaveClock
from posttrain.workflow.policy import Policy
from posttrain.workflow.saving import Saver, restore
from posttrain.workflow.stopping import StopSignal
from posttrain.workflow.training import Training

PACK_TOKENS = 512
SAVED, STEPS = 2, 4
"""Steps after which the checkpoint is written, and after which the rank is stopped."""
PATIENT_S = 120.0
"""A deadline of what is not tested."""
DEADLINE_S = 10.0
"""Of the step in which a rank is stopped."""
IN_THE_STEP_S = 1.0
"""For the living rank to come to the collective; a step takes a tenth of it."""
TRAINING = Training(
    num_steps=20, lr=1e-3, schedule="constant", warmup_steps=0, betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=1.0,
    pack_tokens=PACK_TOKENS, deterministic=True,
)  # fmt: skip


def packs_of(step: int, *, number: int = 4, tokens: int = PACK_TOKENS) -> list[Pack]:
    """A step's packs of one document each, whose ids are in any of the programs' vocabularies."""
    rng = np.random.default_rng(step)
    lengths = rng.integers(tokens * 2 // 3, tokens, number)
    units = [(shift(rng.integers(1, 300, n), [0.0, *[1.0] * (n - 1)]),) for n in lengths]
    return pack(units, pack_tokens=tokens)


async def launch(model_uri: str, gpus: int) -> Policy:
    """Two ranks, sharded on GPUs as in every run there."""
    return await Policy.launch(
        sizes=Sizes(data=2),
        model_uri=model_uri,
        backend="posttrain",
        training=TRAINING,
        reference=False,
        timeout_s=PATIENT_S,
        pool=Pool(gpus=1 if gpus else 0),
    )


async def step(policy: Policy, number: int) -> dict[str, float]:
    """One optimizer step; what must be the same in a run that goes on from a checkpoint."""
    found = await policy.train_step(number, packs_of(number), SFTLoss())
    return {name: value for name, value in found.items() if name in ("loss", "grad_norm", "lr", "entropy")}


async def train(policy: Policy, kept: Checkpoints) -> list[dict[str, float]]:
    """Metrics of STEPS steps, with a checkpoint after SAVED of them."""
    clock = SaveClock(num_steps=10**6, every_steps=SAVED, every_seconds=3600.0)
    saver, found = Saver(policy, kept, clock=clock, stop=StopSignal()), []
    for number in range(STEPS):
        found.append(await step(policy, number))
        if number + 1 == SAVED:
            await saver.after_step(number + 1, dict)
    await saver._settle(must=True)
    return found


async def broken_step(policy: Policy, sent: signal.Signals, *, timeout_s: float) -> tuple[ComputeError | None, float]:
    """The error of a step whose rank 1 stands still and then gets a signal, and the seconds from there to the error."""
    where = policy.group.where(1)
    assert where is not None, "rank 1 has taken steps"
    os.kill(where.pid, signal.SIGSTOP)
    policy.timeout_s = timeout_s
    work = asyncio.ensure_future(step(policy, STEPS))
    await asyncio.sleep(IN_THE_STEP_S)
    if sent is not signal.SIGSTOP:
        os.kill(where.pid, sent)
    start = time.monotonic() - (IN_THE_STEP_S if sent is signal.SIGSTOP else 0.0)
    try:
        await work
    except ComputeError as error:
        return error, time.monotonic() - start
    return None, time.monotonic() - start


def end(policy: Policy) -> None:
    """Kill both ranks, the stopped one too, so that their GPUs are free for others."""
    for rank in range(len(policy.group)):
        policy.group.end(rank)
    policy.group.kill()


async def stopped(model_uri: str, gpus: int, kept: Checkpoints) -> list[dict[str, float]]:
    """Steps of ranks of which one is stopped at last; tells of it."""
    policy = await launch(model_uri, gpus)
    expected = await train(policy, kept)
    error, seconds = await broken_step(policy, signal.SIGSTOP, timeout_s=DEADLINE_S)
    named = isinstance(error, WorkerHungError) and bool(re.match(r"policy [01]: train_step\(\) did not", str(error)))
    end(policy)
    say(
        "rank_stopped",
        passed=named,
        happened=first_line(error),
        detected_s=round(seconds, 1),
        deadline_s=DEADLINE_S,
        lost_steps=STEPS - SAVED,
    )
    return expected


async def resumed(policy: Policy, expected: list[dict[str, float]], kept: Checkpoints, out: str) -> None:
    """Go on from the checkpoint; tells whether the steps are those of before, and the export what the ranks hold."""
    from safetensors.torch import load_file

    start = time.monotonic()
    found = await restore(policy, kept)
    seconds = time.monotonic() - start
    assert found is not None, "the checkpoint was committed"
    again = [await step(policy, number) for number in range(found.step, STEPS)]
    equal = again == expected[found.step :]
    gap = max(abs(new["loss"] - old["loss"]) for new, old in zip(again, expected[found.step :], strict=True))
    say(
        "ranks_resume",
        passed=equal and found.step == SAVED,
        happened=f"restored in {seconds:.1f} s; steps {found.step + 1} to {STEPS} "
        + ("again to the bit" if equal else f"again with losses up to {gap:.2g} apart"),
        lost_steps=len(again),
    )
    held = await policy.weights_digest("float32")
    uri = await policy.export(out)
    files = load_file(Path(uri, "model.safetensors"))
    names = await policy.group.call("weights", "float32", timeout_s=PATIENT_S)
    written = digest((name, files[name].float()) for name in names[0])
    say("ranks_export", passed=written == held, happened=f"{len(files)} tensors, digest {written[:12]} of {held[:12]}")


async def killed(policy: Policy) -> None:
    """Kill a rank in a step; tells of it."""
    error, seconds = await broken_step(policy, signal.SIGKILL, timeout_s=PATIENT_S)
    named = isinstance(error, WorkerDiedError) and str(error).startswith("policy 1 died during train_step()")
    end(policy)
    say("rank_killed", passed=named, happened=first_line(error), detected_s=round(seconds, 1), deadline_s=PATIENT_S)


def first_line(error: Any) -> str:
    """What an error says first, without this machine's names."""
    said = str(error).splitlines()[0] if error else "no error"
    return re.sub(r" \[host .*?\]", "", said)[:300]


async def main(gpus: int, folder: Path) -> None:
    """All cases, one after another."""
    model_uri = model_folder(folder / "model", gpus=gpus)
    checkpoints = Checkpoints(str(folder / "checkpoints"), identity={}, keep=2)
    with checkpoints.writing() as kept:
        expected = await stopped(model_uri, gpus, kept)
        policy = await launch(model_uri, gpus)
        await resumed(policy, expected, kept, str(folder / "exported"))
        await killed(policy)


if __name__ == "__main__":
    asked = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as name, ray_cluster(Gang(), num_cpus=4, num_gpus=asked):
        asyncio.run(main(asked, Path(name)))
