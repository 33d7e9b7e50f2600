"""The tiny SFT and GRPO under random faults for hours: does every run end right, and does nothing grow?

    python -m benchmarks.soak [--minutes 120] [--every 20 60] [--seed 0]

SFT and GRPO take turns, a run each in a folder of its own. Every 20 to 60 s something breaks: the driver, a training
rank, a generator or a reward process is killed; a rank is stopped for a while and continued; the driver gets SIGTERM.
Whatever ends is started again, as a scheduler would. A run counts once its ledger is proved (`posttrain audit`), and
an SFT run once its weights are those of a run that was left alone. Memory, file descriptors and processes are
measured at the same place of every run: the means of the first and of the last third are told.

Writes benchmarks/results/soak.json, and the output of all runs into FOLDER/log (--folder).
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil

from benchmarks.inputs import prepared
from benchmarks.report import RESULTS, hardware, versions
from posttrain.config import RunConfig
from posttrain.config_file import load_config
from steps.audit import audit

ROOT = Path(__file__).resolve().parents[1]
PREEMPTED = 75
"""Exit status of a run that saved and stopped because it was asked to."""
PAUSE_S = 5.0
"""For how long a rank is stopped: less than any deadline."""
LONGEST_S = 1800.0
"""For one run with all its restarts; more is a hang."""
LEFT_S = 30.0
"""After the last run's end, for processes that Ray started to be gone."""
SMALL: dict[str, Any] = {
    "model.fresh": {"hidden_size": 32, "num_layers": 2},
    "data.pack_tokens": 128,
    "checkpoint.every_steps": 50,
    "rollout.timeout_s": 300,
    "eval.every_steps": 100,
}
STEPS = {"sft": 1500, "grpo": 150}
"""Of a run: some minutes on two cores, so that it meets several faults."""
EXTRA: dict[str, dict[str, Any]] = {
    "sft": {"eval.prompts": None, "reward": None},
    "grpo": {
        **{"warmup.num_steps": 20, "rollout.prompts_per_step": 4, "method.group_size": 4, "checkpoint.every_steps": 10},
        **{"rollout.max_failures": 10_000, "reward.max_failures": 10_000},
    },
}
MODULES = {"sft": ("train", {"recipe": True}), "grpo": ("grpo", {})}


@dataclass
class Soak:
    """What has happened so far."""

    folder: Path
    chance: random.Random
    every: Sequence[float]
    faults: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    runs: list[dict[str, Any]] = field(default_factory=list)


def main() -> int:
    """Soak, and write what came of it; 1 if a run did not end right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--every", type=float, nargs=2, default=[20.0, 60.0], help="seconds between two faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=float, default=1.0, help="share of the steps of a run")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="posttrain-soak-"))
    soak = Soak(folder=folder, chance=random.Random(options.seed), every=options.every)
    ready = {name: inputs_of(name, folder / name, options.steps) for name in ("sft", "grpo")}
    print("an SFT run that is left alone", flush=True)
    alone = run(soak, "sft", ready["sft"], folder / "alone", broken=False)
    ends = time.monotonic() + 60 * options.minutes
    while time.monotonic() < ends:
        name = ("sft", "grpo")[len(soak.runs) % 2]
        found = run(soak, name, ready[name], folder / f"run_{len(soak.runs):03d}", broken=True)
        found["equal"] = found["weights"] == alone["weights"] if name == "sft" else None
        soak.runs.append(found)
        print(json.dumps({key: found[key] for key in ("name", "starts", "faults", "equal", "minutes")}), flush=True)
    result = summary(soak, options)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=2))
    return int(any(run["equal"] is False or not run["ledger"] for run in soak.runs))


def inputs_of(name: str, root: Path, share: float) -> dict[str, Any]:
    """Everything up to training, once; the inputs of the training program."""
    base = {"base": str(ROOT / "configs" / f"{name}_tiny.yaml"), "optim.num_steps": max(4, int(STEPS[name] * share))}
    config: RunConfig = load_config(json.dumps(base | SMALL | EXTRA[name]))
    inputs = prepared(config, root)
    (root / "config.json").write_text(config.model_dump_json())
    return {"config": config.model_dump(mode="json"), **inputs.plain(), **MODULES[name][1]}


def run(soak: Soak, name: str, inputs: dict[str, Any], root: Path, *, broken: bool) -> dict[str, Any]:
    """One run to its end, started again whenever it ends otherwise; what it left, proved."""
    root.mkdir(parents=True)
    for shared in ("data", "model", "tokens", "config.json"):
        (root / shared).symlink_to(soak.folder / name / shared)
    (root / "inputs.json").write_text(json.dumps({**inputs, "root": str(root)}))
    began, starts, faults, peaks = time.monotonic(), 0, Counter[str](), dict[str, float]()
    status = -1
    while status != 0:
        assert time.monotonic() - began < LONGEST_S, f"{root} does not come to an end; see {soak.folder / 'log'}"
        starts += 1
        status = attempt(soak, name, root, faults if broken else None, peaks)
        soak.ends[_words(status)] += 1
    stage = audit(str(root))["stages"][name]
    weights = root / "trained_model" / "model.safetensors"
    return {
        "name": name,
        "minutes": round((time.monotonic() - began) / 60, 2),
        "starts": starts,
        "faults": dict(faults),
        "ledger": stage["steps"] == inputs["config"]["optim"]["num_steps"],
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        **{key: round(value, 1) for key, value in peaks.items()},
    }


def attempt(soak: Soak, name: str, root: Path, faults: Counter[str] | None, peaks: dict[str, float]) -> int:
    """One process of the training program, broken now and then if `faults` counts them; its exit status."""
    command = [sys.executable, "-m", f"steps.{MODULES[name][0]}", str(root / "inputs.json")]
    with open(soak.folder / "log", "a") as log:
        process = subprocess.Popen(command, cwd=root, stdout=log, stderr=log, start_new_session=True)
    due = time.monotonic() + soak.chance.uniform(*soak.every)
    while process.poll() is None:
        measure(process.pid, peaks)
        if faults is not None and time.monotonic() > due:
            if kind := break_something(soak.chance, psutil.Process(process.pid)):
                faults[kind] += 1
                soak.faults[kind] += 1
            due = time.monotonic() + soak.chance.uniform(*soak.every)
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            continue
    return process.returncode


def break_something(chance: random.Random, driver: psutil.Process) -> str | None:
    """One fault at random; None where what it is for is not there at the moment."""
    kinds: dict[str, Callable[[], None]] = {
        "driver killed": lambda: driver.send_signal(signal.SIGKILL),
        "driver asked to stop": lambda: driver.send_signal(signal.SIGTERM),
        "rank killed": lambda: _one(chance, driver, "PolicyRank").send_signal(signal.SIGKILL),
        "rank stopped for a while": lambda: _pause(_one(chance, driver, "PolicyRank")),
        "generator killed": lambda: _one(chance, driver, "Generator").send_signal(signal.SIGKILL),
        "reward process killed": lambda: _one(chance, driver, "child_main").send_signal(signal.SIGKILL),
    }
    for kind in chance.sample(sorted(kinds), len(kinds)):
        try:
            kinds[kind]()
        except (LookupError, psutil.NoSuchProcess):
            continue
        return kind
    return None


def _one(chance: random.Random, driver: psutil.Process, word: str) -> psutil.Process:
    """A process below the driver's whose command line holds a word.

    Raises:
        LookupError: there is none.
    """
    found = [each for each in _below(driver) if word in " ".join(_quietly(each.cmdline, []))]
    if not found:
        raise LookupError(word)
    return chance.choice(found)


def _pause(process: psutil.Process) -> None:
    process.suspend()
    time.sleep(PAUSE_S)
    process.resume()


def measure(pid: int, peaks: dict[str, float]) -> None:
    """Raise the peaks of a run to what its processes are and hold now."""
    try:
        processes = [psutil.Process(pid), *_below(psutil.Process(pid))]
    except psutil.NoSuchProcess:
        return
    driver = processes[0]
    now = {
        "processes": float(len(processes)),
        "memory_mib": sum(_quietly(lambda p=p: p.memory_info().rss, 0) for p in processes) / 2**20,
        "driver_mib": _quietly(lambda: driver.memory_info().rss, 0) / 2**20,
        "driver_files": float(_quietly(driver.num_fds, 0)),
        "open_files": float(sum(_quietly(p.num_fds, 0) for p in processes)),
    }
    for key, value in now.items():
        peaks[key] = max(peaks.get(key, 0.0), value)


def _below(process: psutil.Process) -> list[psutil.Process]:
    return _quietly(lambda: process.children(recursive=True), [])


def _quietly(read: Callable[[], Any], otherwise: Any) -> Any:
    """What a process says of itself, or something else where it has ended."""
    try:
        return read()
    except psutil.Error:
        return otherwise


def _words(status: int) -> str:
    if status == PREEMPTED:
        return "saved and stopped"
    return "finished" if status == 0 else signal.Signals(-status).name if status < 0 else f"exit status {status}"


def _left(folder: Path) -> list[int]:
    """Processes of the runs that are there a while after the last."""
    found = [0]
    until = time.monotonic() + LEFT_S
    while found and time.monotonic() < until:
        time.sleep(1.0)
        found = [p.pid for p in psutil.process_iter() if str(folder) in _quietly(p.cwd, "")]
    return found


def summary(soak: Soak, options: argparse.Namespace) -> dict[str, Any]:
    """The result file."""
    growth = {}
    for name in ("sft", "grpo"):
        runs = [run for run in soak.runs if run["name"] == name]
        third = max(1, len(runs) // 3)
        for key in ("processes", "memory_mib", "driver_mib", "driver_files", "open_files") if runs else ():
            first, last = (fmean(run[key] for run in part) for part in (runs[:third], runs[-third:]))
            growth[f"{name} {key}"] = {"first": round(first, 1), "last": round(last, 1)}
    left = _left(soak.folder)
    return {
        "benchmark": "soak",
        "workload": f"tiny SFT and GRPO in turn, a fault every {options.every[0]:g} to {options.every[1]:g} s",
        "hardware": f"{hardware()}, {os.cpu_count()} cores",
        "versions": versions("torch", "transformers", "ray"),
        "minutes": options.minutes,
        "seed": options.seed,
        "faults": dict(soak.faults),
        "ends": dict(soak.ends),
        "runs_finished": len(soak.runs),
        "ledgers_proved": sum(run["ledger"] for run in soak.runs),
        "sft_runs_equal": sum(run["equal"] is True for run in soak.runs),
        "sft_runs": sum(run["name"] == "sft" for run in soak.runs),
        "peaks": growth,
        "processes_left": len(left),
        "runs": soak.runs,
    }


if __name__ == "__main__":
    sys.exit(main())
