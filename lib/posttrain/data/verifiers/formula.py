"""A reward that compares formulas, by math-verify (extra `eval`) in a process of its own with a limit.

A short formula can keep a computer algebra system busy for ever. `python -m posttrain.data.verifiers.formula` is the
other end: one JSON line of gold and completion in, one of the outcome out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.data.types import Row

LIMIT_S = 3.0
"""For one comparison, seconds; those of a group, in a row, have reward.timeout_s."""
START_S = 60.0
MEMORY_BYTES = 2 * 2**30
LONGEST = 20_000
"""Characters of a completion that are read, from its end, where the answer is."""

_process: subprocess.Popen[str] | None = None


def math(row: Row, completion: str) -> float:
    """1 where the formula or number that the completion ends up with equals that of the row's `answer`.

    Raises:
        ImportError: math-verify is not installed.
        KeyError, ValueError: the row has no `answer`, or there is no formula in it.
        TimeoutError: the comparison was not done in LIMIT_S: the completion is neither right nor wrong.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("posttrain.data.verifiers:math needs math-verify. Fix: pip install 'posttrain[eval]'")
    reply = _asked({"gold": str(row["answer"]), "completion": completion[-LONGEST:]})
    if "error" in reply:
        raise ValueError(reply["error"])
    return float(reply["equal"])


def _asked(question: dict[str, str]) -> dict[str, Any]:
    global _process
    if _process is None:
        _process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        _exchange(_process, None, START_S)
    try:
        return _exchange(_process, question, LIMIT_S)
    except TimeoutError:
        _process = None
        raise


def _exchange(process: subprocess.Popen[str], question: dict[str, str] | None, limit_s: float) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(limit_s, end)
    timer.start()
    try:
        if question is not None:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    finally:
        timer.cancel()
        timer.join()  # an answer that came as the time ran out is of a process that is dead by now, or not
    if late.is_set() or not line.endswith("\n"):
        process.kill()
        process.wait()
        raise TimeoutError(f"the comparison was not done in {limit_s:g} s and {MEMORY_BYTES >> 30} GiB")
    return json.loads(line)


def _compare(gold: str, completion: str) -> dict[str, Any]:
    from math_verify import parse, verify  # pyright: ignore[reportMissingImports]

    # Their own limits are alarms of the main thread; ours is the process's end.
    marked = gold if "$" in gold or "\\boxed" in gold else f"${gold}$"
    wanted = parse(marked, parsing_timeout=0) or parse(gold, parsing_timeout=0)
    if all(isinstance(each, str) for each in wanted):
        return {"error": f"there is no formula in the answer {gold[:80]!r}"}
    found = parse(completion, parsing_timeout=0)
    return {"equal": bool(found) and bool(verify(wanted, found, timeout_seconds=0))}


def main() -> None:
    """Answer until the input ends."""
    import math_verify  # noqa: F401  # pyright: ignore[reportMissingImports]

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("{}", flush=True)
    for line in sys.stdin:
        print(json.dumps(_compare(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
