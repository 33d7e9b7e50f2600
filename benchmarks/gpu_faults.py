"""Faults that need a GPU, with the real parts: what is noticed, after how long, and what it costs.

    python -m benchmarks.gpu_faults [--only ranks memory engine split] [--cpu] [--out FILE]

Four programs, each in processes of its own with a deadline; about four minutes together:

    ranks    two policy ranks over NCCL: one is stopped in a step, then one is killed in a step (two GPUs)
    memory   one policy rank: its GPU is full in a step; what it exports is what it trained
    engine   a vLLM engine: killed while it samples, then stopped while it samples
    split    a vLLM engine over two GPUs, with processes of its own: killed while it samples (two GPUs)

What cannot run says why. benchmarks/results/gpu_faults.json keeps the newest result of every case, and
benchmarks/reliability.py puts them into docs/reliability.md. `--cpu` tries the script where there is no GPU, with gloo
and the embedded generator, and keeps nothing unless --out says where.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, versions

RESULT = RESULTS / "gpu_faults.json"
SAID = "GPU_FAULT "
"""Begins the lines of a program that say what became of a case."""
LEFT_S = 10.0
"""After a program's end, for processes that it started to be gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One fault that a program makes."""

    program: str
    row: str
    """F1 to F50, of benchmarks/reliability.py."""
    outcome: str
    what: str
    gpu_only: bool = False
    """Not tried by --cpu."""


CASES = {
    "rank_stopped": Case(
        program="ranks",
        row="F5",
        outcome="STOP",
        what="a policy rank is stopped in a step, its peer in NCCL",
    ),
    "rank_killed": Case(
        program="ranks", row="F1", outcome="STOP", what="a policy rank is killed in a step, its peer in NCCL"
    ),
    "ranks_resume": Case(
        program="ranks", row="F1", outcome="RESUME", what="two NCCL ranks go on from their checkpoint, to the same bits"
    ),
    "ranks_export": Case(
        program="ranks", row="F25", outcome="CONTINUE", what="the export of two sharded ranks is what they hold"
    ),
    "gpu_full": Case(
        program="memory", row="F10", outcome="STOP", what="a GPU whose memory is taken by another", gpu_only=True
    ),
    "gpu_full_resume": Case(
        program="memory",
        row="F10",
        outcome="RESUME",
        gpu_only=True,
        what="a run whose GPU was full goes on from its checkpoint",
    ),
    "export": Case(
        program="memory", row="F25", outcome="CONTINUE", what="transformers computes the trained loss from the export"
    ),
    "engine_killed": Case(
        program="engine", row="F6", outcome="CONTINUE", what="a vLLM engine is killed while it samples"
    ),
    "engine_stopped": Case(
        program="engine", row="F7", outcome="CONTINUE", what="a vLLM engine is stopped while it samples"
    ),
    "engine_memory": Case(
        program="engine", row="F8", outcome="CONTINUE", what="process and GPU memory of a killed vLLM engine"
    ),
    "engine_memory_stopped": Case(
        program="engine", row="F8", outcome="CONTINUE", what="process and GPU memory of a stopped vLLM engine"
    ),
    "split_memory": Case(
        program="split", row="F8", outcome="CONTINUE", what="processes and memory of a killed vLLM engine on two GPUs"
    ),
}
PROGRAMS = {"ranks": 180.0, "memory": 120.0, "engine": 260.0, "split": 150.0}
"""Deadlines, seconds."""
MODULES = {
    "ranks": "gpu_fault_ranks",
    "memory": "gpu_fault_memory",
    "engine": "gpu_fault_engine",
    "split": "gpu_fault_engine",
}
STAGES = (("ranks",), ("engine", "memory"), ("split",))
"""Programs of one stage run at once where there are two GPUs, on one each."""
MARK = "POSTTRAIN_GPU_FAULTS"
"""Environment variable that all processes of one program inherit, with a value of its own."""
SHAPES = {
    "cuda": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 32_000},
    "cpu": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 300},
}
"""Of the model that all programs train or sample from: random weights in the shape of a Qwen3."""
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096}


def main() -> int:
    """Run the programs and keep what they found; 1 if a case went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--cpu", action="store_true", help="try the script without a GPU")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    out = options.out or (None if options.cpu else RESULT)
    gpus, machine = (0, f"{platform.machine()} CPU") if options.cpu else gpus_here()
    rows = []
    for stage in STAGES:
        programs = [program for program in stage if program in options.only]
        with ThreadPoolExecutor(len(STAGES) if gpus > 1 else 1) as pool:
            places = range(len(programs)) if gpus > 1 else [0] * len(programs)
            for found in pool.map(partial(found_by, gpus=gpus, cpu=options.cpu), programs, places):
                rows += [row_of(name, more, machine) for name, more in found.items()]
        for row in rows[-sum(case.program in programs for case in CASES.values()) :] if programs else ():
            print(json.dumps(row), flush=True)
        if out:
            keep(out, rows)
    return int(any(row.get("passed") is False for row in rows))


def gpus_here() -> tuple[int, str]:
    """How many GPUs, and of which kind; asked in another process, as this one takes no memory of them."""
    code = "import torch as t; n = t.cuda.device_count(); print(n, t.cuda.get_device_name() if n else 'no GPU')"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    count, _, name = said.strip().splitlines()[-1].partition(" ")
    return int(count), name


def found_by(program: str, place: int, *, gpus: int, cpu: bool) -> dict[str, dict[str, Any]]:
    """What became of each case of a program.

    Args:
        place: the GPU that a program of one GPU gets.
    """
    names = [name for name, case in CASES.items() if case.program == program]
    if why := cannot_run(program, gpus=gpus, cpu=cpu):
        return {name: {"not_run": why} for name in names}
    taken = 0 if cpu else needed(program)
    here = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    devices = here.split(",")[: taken if taken > 1 else None][place if taken == 1 else 0 :]
    results, ended, seconds, left = run(program, devices[:taken], timeout_s=PROGRAMS[program])
    none = {"passed": False, "happened": f"no result: {ended}"}
    about = {"gpus": taken, "program_s": round(seconds, 1), "processes_left": left}
    if cpu:
        results |= {name: {"not_run": "needs a GPU"} for name in names if CASES[name].gpu_only}
    return {name: {**results.get(name, none), **about} for name in names}


def needed(program: str) -> int:
    """GPUs that a program takes."""
    return 2 if program in ("ranks", "split") else 1


def cannot_run(program: str, *, gpus: int, cpu: bool) -> str:
    """Why a program cannot run here; empty if it can."""
    if cpu:
        return "needs two GPUs" if program == "split" else ""
    if gpus < needed(program):
        return f"needs {'two GPUs' if needed(program) == 2 else 'a GPU'}; here {'is one' if gpus else 'is none'}"
    if program in ("engine", "split") and "vllm" not in versions("vllm"):
        return "needs vLLM, which is not installed"
    return ""


def run(program: str, devices: Sequence[str], *, timeout_s: float) -> tuple[dict[str, dict[str, Any]], str, float, int]:
    """What a program said of its cases, how it ended, its seconds, and how many of its processes lived LEFT_S longer.

    Args:
        devices: the GPUs that it sees.
    """
    from posttrain.compute.reaper import marked

    mark, start = uuid.uuid4().hex, time.monotonic()
    # FlashInfer's sampler is compiled at its first use, for which a machine without CUDA's compiler has nothing.
    asked = {"VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1"}
    environment = asked | os.environ | {MARK: mark, "CUDA_VISIBLE_DEVICES": ",".join(devices)}
    command = [sys.executable, "-m", f"benchmarks.{MODULES[program]}", str(len(devices))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        said, _ = process.communicate(timeout=timeout_s)
        ended = f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        ended = f"not done after {timeout_s:g} s"
    seconds = time.monotonic() - start
    ends = time.monotonic() + LEFT_S
    while (left := marked(mark, name=MARK)) and time.monotonic() < ends:
        time.sleep(0.2)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    results, rest = {}, []
    for line in said.splitlines():
        if line.startswith(SAID):
            found = json.loads(line.removeprefix(SAID))
            results[found.pop("case")] = found
        else:
            rest.append(line)
    print("\n".join(rest), file=sys.stderr, flush=True)
    return results, ended, seconds, len(left)


def say(case: str, *, passed: bool, happened: str, **more: Any) -> None:
    """What a program found of a case: a line of its output."""
    print(SAID + json.dumps({"case": case, "passed": passed, "happened": happened, **more}), flush=True)


def model_folder(folder: Path, *, gpus: int) -> str:
    """A published folder with the programs' model."""
    from posttrain import storage
    from posttrain.model.random_model import write_random_model

    shape = HEADS | SHAPES["cuda" if gpus else "cpu"] | {"model_type": "qwen3", "tie_word_embeddings": True}
    storage.ensure_folder(str(folder), lambda target: (write_random_model(target, shape, seed=0), None)[1])
    return str(folder)


def row_of(name: str, found: dict[str, Any], machine: str) -> dict[str, Any]:
    """A line of the result file."""
    case = CASES[name]
    about = {"benchmark": "gpu_faults", "case": name, "fault": case.row, "outcome": case.outcome, "what": case.what}
    return {**about, **found, "hardware": machine, "versions": versions("torch", "ray", "vllm", "transformers")}


def keep(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows over those of the same cases; one that could not run here takes no result away."""
    known = {row["case"]: row for row in json.loads(path.read_text())} if path.exists() else {}
    for row in rows:
        if "not_run" not in row or "passed" not in known.get(row["case"], {}):
            known[row["case"]] = row
    path.write_text(json.dumps([known[name] for name in CASES if name in known], indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
