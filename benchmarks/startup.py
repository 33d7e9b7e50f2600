"""Where the time of a first run on a CPU goes: imports, Ray, Metaflow, our flow around it, every step of the default.

Four measurements, each in processes of their own and in a folder of their own: the import of the package with its
config schema, beside a bound of one second; Ray brought up and down as a step does; a flow of ours whose steps have no
program (benchmarks/flows/idle_flow.py), beside bare Metaflow with as many tasks and cards, and again with a typed
config in every task, as where a step calls a program (typed_flow.py); and the default flow, `python
flows/grpo_flow.py run`: seconds of every step by Metaflow's own log, and what its training steps say they did.
To be run on an idle machine: the load at the start is in every row.

    python -m benchmarks.startup [--repeat 3] [--no-run] [--out FILE]
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.report import row, versions, write

ROOT = Path(__file__).parents[1]
IMPORTS = "import posttrain, posttrain.config_file"
RAY = """
import time
from posttrain.compute.cluster import Gang, ray_cluster
started = time.perf_counter()
with ray_cluster(Gang(), num_cpus=2, num_gpus=0):
    up = time.perf_counter()
print(up - started, time.perf_counter() - up)
"""
WORK = ("forward", "backward", "reduce", "optimizer", "prepare")
"""Of a training step's times, those in which the policy computes."""
TASK = re.compile(r"^(\S+ \S+) \[[^/]+/(\w+)/\d+.*?\] Task (is starting|finished successfully)")


def seconds_of(command: list[str], **how: Any) -> float:
    started = time.perf_counter()
    output(command, **how)
    return time.perf_counter() - started


def output(command: list[str], **how: Any) -> str:
    """What a command that must succeed prints, errors included."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def imported(repeat: int) -> dict[str, Any]:
    """Seconds of the package's import beyond those of an empty program, the best of some."""
    empty, whole = (min(seconds_of([sys.executable, "-c", code]) for _ in range(repeat)) for code in ("", IMPORTS))
    what = f"`{IMPORTS}`, without torch; baseline: the bound"
    return made(what, ours=whole - empty, baseline=1.0, interpreter_s=round(empty, 3))


def ray_started(repeat: int) -> dict[str, Any]:
    """Seconds until Ray is imported and up, the best of some, and until it is gone."""
    runs = []
    for _ in range(repeat):
        runs.append(tuple(map(float, output([sys.executable, "-c", RAY]).splitlines()[-1].split())))
    up, down = min(runs)
    return made("Ray brought up on loopback in a step", ours=up, baseline=None, down_s=round(down, 3))


def flow_overhead(repeat: int) -> list[dict[str, Any]]:
    """Seconds of flows without work, the best of some each, in turn; and of processors, which other load moves less."""
    found: dict[str, list[float]] = {"idle": [], "typed": [], "bare": []}
    cpu: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repeat):
        for name, runs in found.items():
            path, before = ROOT / "benchmarks" / "flows" / f"{name}_flow.py", cpu_s()
            with own_folder() as how:
                runs.append(seconds_of([sys.executable, str(path), "run"], **how))
            cpu[name].append(round(cpu_s() - before, 2))
    kinds = {"idle": "", "typed": ", and a typed config in every task"}
    return [overhead_row(f"a flow without work, 9 tasks and 5 cards{kinds[name]}", name, found, cpu) for name in kinds]


def overhead_row(what: str, name: str, found: dict[str, list[float]], cpu: dict[str, list[float]]) -> dict[str, Any]:
    """One flow beside bare Metaflow."""
    over = {key: round(min(each[name]) / min(each["bare"]) - 1, 3) for key, each in (("s", found), ("cpu", cpu))}
    more = {"overhead": over["s"], "cpu_overhead": over["cpu"], "all_s": [found[name], found["bare"]]}
    more["cpu_s"] = [cpu[name], cpu["bare"]]
    return made(f"{what}; baseline: bare Metaflow's", ours=min(found[name]), baseline=min(found["bare"]), **more)


def cpu_s() -> float:
    """Seconds of processors that all processes which were waited for have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def default_flow() -> dict[str, Any]:
    """The default run: seconds of every step, and of what its training did."""
    with own_folder() as how:
        started = time.perf_counter()
        log = output([sys.executable, str(ROOT / "flows" / "grpo_flow.py"), "run"], **how)
        whole = time.perf_counter() - started
        metrics = {path.stem: path.read_text() for path in how["cwd"].rglob("metrics/*.jsonl")}
    steps = tasks(log)
    inside = {name: times(text) for name, text in metrics.items()}
    rest = whole - sum(steps.values())
    what = "`python flows/grpo_flow.py run`: the default configuration"
    return made(what, ours=whole, baseline=None, steps_s=steps, between_tasks_s=round(rest, 2), training_s=inside)


def tasks(log: str) -> dict[str, float]:
    """Step -> seconds of its task, by Metaflow's log; of a foreach, from the first start to the last end."""
    begun: dict[str, datetime] = {}
    found: dict[str, float] = {}
    for line in log.splitlines():
        if match := TASK.match(line):
            at, name, what = datetime.fromisoformat(match[1]), match[2], match[3]
            if what == "is starting":
                begun.setdefault(name, at)
            else:
                found[name] = max(found.get(name, 0.0), round((at - begun[name]).total_seconds(), 2))
    return found


def times(lines: str) -> dict[str, float]:
    """What the steps of one training took together, seconds by what they did; the policy's own work as "train"."""
    found: dict[str, float] = {}
    for line in lines.splitlines():
        for name, value in json.loads(line).items():
            if name.startswith("time/"):
                part = name.removeprefix("time/").removesuffix("_s")
                part = "train" if part in WORK else part
                found[part] = found.get(part, 0.0) + value
    return {name: round(value, 2) for name, value in found.items()}


def made(what: str, *, ours: float, baseline: float | None, **more: Any) -> dict[str, Any]:
    """A row of the results, with the machine's load."""
    found = row("startup", what, ours=ours, baseline=baseline, unit="s", load=round(os.getloadavg()[0], 2), **more)
    packages = versions("metaflow", "ray", "pydantic", "torch")
    return found | {"hardware": f"{os.cpu_count()} CPU cores", "versions": packages}


@contextmanager
def own_folder() -> Iterator[dict[str, Any]]:
    """Where a flow runs without this machine's own Metaflow configuration: arguments of subprocess.run()."""
    with tempfile.TemporaryDirectory() as folder:
        env = {name: value for name, value in os.environ.items() if not name.startswith("METAFLOW_")}
        env |= {"METAFLOW_HOME": f"{folder}/home", "METAFLOW_USER": "benchmark"}
        env |= {"METAFLOW_DATASTORE_SYSROOT_LOCAL": folder}
        yield {"cwd": Path(folder), "env": env}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="of which the best counts")
    parser.add_argument("--no-run", action="store_true", help="without the default flow, which takes minutes")
    parser.add_argument("--out")
    options = parser.parse_args()
    rows = [imported(options.repeat), ray_started(options.repeat), *flow_overhead(options.repeat)]
    rows += [] if options.no_run else [default_flow()]
    write("startup", rows, options.out)


if __name__ == "__main__":
    main()
