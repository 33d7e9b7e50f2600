"""Of benchmarks/gpu_faults.py: a vLLM engine that is killed, then one that is stopped, while it samples.

The engine is an actor behind the same Generators as in a run: on one GPU, or split over two with processes of its own.
After its death the requests must be answered by another, and what the dead one held of the GPU must be free before the
next takes it. Without a GPU the embedded generator stands in, and there is no memory to watch.
"""

import asyncio
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.gpu_faults import model_folder, say
from posttrain.compute.cluster import Gang, ray_cluster
from posttrain.compute.generator import Completion, Request
from posttrain.compute.generator.transformers import TransformersGenerator
from posttrain.compute.generator.vllm import VllmGenerator, vllm_is_installed
from posttrain.compute.pool import Pool
from posttrain.compute.weight_sync import digest
from posttrain.compute.workers import ActorGroup
from posttrain.model.backend import backend_of
from posttrain.model.load import load_decoder
from posttrain.workflow.generators import Generators
from posttrain.workflow.policy_model import sent_tensors

PATIENT_S = 150.0
"""A deadline of what is not tested: an engine's start takes about a minute."""
DEADLINE_S = 8.0
"""Of a call in which the engine is stopped."""
SERVING_S = 0.7
"""From the call to the fault."""
BACK_S = 20.0
"""For memory and processes to be gone; the next engine takes memory no sooner than it has imported vLLM."""
SLACK = 256 << 20
"""Bytes by which free memory may differ from before: what other contexts took meanwhile."""
REQUESTS, NEW_TOKENS = {True: 64, False: 8}, {True: 3500, False: 600}
"""With a GPU, and without: calls of many seconds."""
SHARE = 0.3
"""Of the GPU's memory, for the engine."""


class Watch:
    """Free memory of all GPUs, and an engine's processes, from a moment on."""

    def __init__(self, gpus: int, free: list[int], pids: list[int]):
        self.gpus, self.free, self.pids = gpus, free, pids
        self.start = time.monotonic()
        self.memory_s: float | None = None
        self.processes_s: float | None = None
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while (seconds := time.monotonic() - self.start) < BACK_S and None in (self.memory_s, self.processes_s):
            if self.processes_s is None and not any(map(alive, self.pids)):
                self.processes_s = seconds
            now = free_memory(self.gpus)
            if self.memory_s is None and all(n > f - SLACK for n, f in zip(now, self.free, strict=True)):
                self.memory_s = seconds
            time.sleep(0.02)

    def say(self, case: str, held: int) -> None:
        """Tell when all was gone."""
        self.thread.join()
        gone = None not in (self.memory_s, self.processes_s)
        memory = f"{held / 2**30:.1f} GiB " + ("are free" if self.memory_s is not None else "are NOT all free")
        ended = "ended" if self.processes_s is not None else f"{sum(map(alive, self.pids))} of them live on"
        say(
            case,
            passed=gone,
            happened=f"{len(self.pids)} processes: {ended}; {memory}" if self.gpus else f"processes: {ended}; no GPU",
            detected_s=round(max(self.memory_s or 0.0, self.processes_s or 0.0), 1) if gone else None,
            memory_s=self.memory_s and round(self.memory_s, 2),
            processes_s=self.processes_s and round(self.processes_s, 2),
        )


def alive(pid: int) -> bool:
    """Whether a process runs, or waits to be looked at as a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_memory(gpus: int) -> list[int]:
    """Free bytes of each GPU."""
    return [torch.cuda.mem_get_info(number)[0] for number in range(gpus)]


def requests() -> list[Request]:
    """Prompts whose answers are long."""
    gpu = torch.cuda.is_available()
    return [
        Request(token_ids=tuple(range(20, 36 + n % 16)), seed=n, temperature=1.0, max_new_tokens=NEW_TOKENS[gpu])
        for n in range(REQUESTS[gpu])
    ]


def processes_of(group: ActorGroup) -> list[int]:
    """The actor's process, first, and those that it started."""
    where = group.where(0)
    assert where is not None, "it has answered"
    return [where.pid, *(child.pid for child in psutil.Process(where.pid).children(recursive=True))]


class Engine:
    """One engine behind Generators, with weights that a replacement is sent again."""

    def __init__(self, model_uri: str, gpus: int):
        self.gpus = gpus
        arguments: dict[str, Any] = {"model_uri": model_uri, "stop_ids": (3,), "pad_id": 0}
        vllm = vllm_is_installed()
        if vllm:
            arguments |= {"max_tokens": 4096, "memory_share": SHARE}
        self.group = ActorGroup(
            "generator", VllmGenerator if vllm else TransformersGenerator, [arguments], Pool(cpus=1, gpus=gpus)
        )
        self.generators = Generators(self.group, timeout_s=PATIENT_S, max_failures=3)
        self.generators.send_weights = self.send
        self.model = load_decoder(model_uri, device=torch.device("cpu"), dtype=torch.float32)
        self.weights: dict[str, torch.Tensor] = {}
        self.proved = 0

    async def send(self) -> None:
        """Send the weights to whoever has none, and compare what arrived."""
        self.generators.timeout_s = PATIENT_S
        if not self.weights:
            dtype = getattr(torch, await self.generators.weight_dtype())
            tensors = sent_tensors(backend_of("posttrain"), self.model, "merged")
            self.weights = {name: tensor.detach().to(dtype) for name, tensor in tensors}
        first = not self.proved
        held = await self.generators.sync(0, lambda rank: self.weights, dead_only=not first)
        assert held == {0: digest(self.weights.items())}, "the engine holds other weights than were sent"
        self.proved += 1

    async def until_dead(self, work: asyncio.Future) -> float:
        """Seconds until the driver knows."""
        start = time.monotonic()
        while not self.generators.dead:
            assert not work.done(), "the call ended before the fault"
            assert time.monotonic() - start < PATIENT_S, "nobody noticed"
            await asyncio.sleep(0.005)
        return time.monotonic() - start


async def broken(engine: Engine, sent: signal.Signals, free: list[int], *, replaced: bool) -> None:
    """Send a signal to an engine in a call; tell what follows, up to the answer of its replacement if asked to."""
    names = (
        ("engine_killed", "engine_memory") if sent is signal.SIGKILL else ("engine_stopped", "engine_memory_stopped")
    )
    names = names if engine.gpus < 2 else ("", "split_memory")
    began: list[float] = []
    pids, held = processes_of(engine.group), sum(free) - sum(free_memory(engine.gpus))
    if sent is not signal.SIGKILL:
        engine.generators.timeout_s = DEADLINE_S
    work = asyncio.ensure_future(engine.generators.generate(requests(), lambda: began.append(time.monotonic())))
    while not began:
        await asyncio.sleep(0.005)
    await asyncio.sleep(SERVING_S)
    assert not work.done(), "the call ended before the fault"
    os.kill(pids[0], sent)
    start = time.monotonic()
    watch = Watch(engine.gpus, free, pids) if sent is signal.SIGKILL else None
    noticed = await engine.until_dead(work)
    watch = watch or Watch(engine.gpus, free, pids)  # a stopped one is killed once it is noticed
    about = {"detected_s": round(noticed, 2), "deadline_s": PATIENT_S if sent is signal.SIGKILL else DEADLINE_S}
    if not replaced:
        await asyncio.to_thread(watch.thread.join)
        if names[0]:
            say(names[0], passed=True, happened="named, killed, and a replacement begun", **about)
        watch.say(names[1], held)
        work.cancel()
        return
    made: list[Completion] = await work
    seconds = time.monotonic() - start
    tokens = sum(len(each.token_ids) for each in made)
    say(
        names[0],
        passed=len(made) == len(requests()) and len(began) == 2 and engine.proved == 2,
        happened=f"another engine, with the same weights, answered all {len(made)} requests, {tokens} tokens, "
        f"{seconds:.0f} s after the kill",
        lost_requests=len(made),
        replaced_s=round(seconds, 1),
        **about,
    )
    watch.say(names[1], held)


async def main(gpus: int, folder: Path) -> None:
    """All cases, one after another."""
    model_uri = model_folder(folder / "model", gpus=gpus)
    free_memory(gpus)  # this process's own contexts come with the first look
    free, start = free_memory(gpus), time.monotonic()
    engine = Engine(model_uri, gpus)
    await engine.send()
    print(f"an engine on {gpus} GPUs is up after {time.monotonic() - start:.0f} s", flush=True)
    await broken(engine, signal.SIGKILL, free, replaced=gpus < 2)
    if gpus < 2:
        await broken(engine, signal.SIGSTOP, free, replaced=False)
    await engine.generators.close()
    engine.group.kill()


if __name__ == "__main__":
    asked = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as name, ray_cluster(Gang(), num_cpus=4, num_gpus=asked):
        asyncio.run(main(asked, Path(name)))
