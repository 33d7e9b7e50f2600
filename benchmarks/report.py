"""What every GPU benchmark shares: the row of a result file, the machine it names, times by device events."""

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def hardware() -> str:
    """The GPU, or the processor where there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"


def versions(*names: str) -> dict[str, str]:
    """Versions of the named distributions that are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def row(
    benchmark: str, workload: str, *, ours: float | None, baseline: float | None, unit: str, **more: Any
) -> dict[str, Any]:
    """One result: `ratio` above 1 means that ours is better, whichever way the unit points; None is a side without
    a number."""
    better_low = unit.split()[0] in ("ms", "s", "GiB", "MiB", "nats")
    better, worse = (baseline, ours) if better_low else (ours, baseline)
    packages = versions("torch", "transformers", "trl", "liger-kernel", "triton", "safetensors")
    return {
        "benchmark": benchmark,
        "workload": workload,
        "hardware": hardware(),
        "versions": packages,
        "ours": None if ours is None else round(ours, 4),
        "baseline": None if baseline is None else round(baseline, 4),
        "ratio": round(better / worse, 3) if worse and better is not None else None,
        "unit": unit,
        **more,
    }


def write(name: str, rows: list[dict[str, Any]], out: str | None, *, keep: bool = False) -> None:
    """Print a JSON line a row and write them all to `out`, or to benchmarks/results/<name>.json.

    Args:
        keep: rows of other workloads that are in the file stay there, before these.
    """
    for each in rows:
        print(json.dumps(each), flush=True)
    path = Path(out) if out else RESULTS / f"{name}.json"
    if keep and path.exists():
        new = {each["workload"] for each in rows}
        rows = [each for each in json.loads(path.read_text()) if each["workload"] not in new] + rows
    path.write_text(json.dumps(rows, indent=2) + "\n")


def in_a_process(module: str, case: dict[str, Any], *, timeout_s: float) -> dict[str, Any] | str:
    """One case of a benchmark, on a GPU without leftovers of the last: what `python -m module --case JSON` prints
    last, as JSON, or why it printed none."""
    command = [sys.executable, "-m", module, "--case", json.dumps(case)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"not done after {timeout_s:g} s"
    if done.returncode:
        return done.stderr.strip()[-1500:] or f"exit status {done.returncode}"
    return json.loads(done.stdout.strip().splitlines()[-1])


def median_ms(run: Callable[[], Any], *, repeat: int = 10, inner: int = 5, warmup: int = 3) -> float:
    """Median milliseconds of run() on the device, over `repeat` times `inner` runs, one after another."""
    import torch

    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / inner)
    return sorted(times)[len(times) // 2]
