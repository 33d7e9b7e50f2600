"""A reward that runs the program in a completion against the row's tests, in a child with limits (sandbox.py)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from posttrain.data.verifiers.sandbox import Limits, run_python

if TYPE_CHECKING:
    from posttrain.data.types import Row

BLOCK = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)```", re.DOTALL)


def code(row: Row, completions: Sequence[str]) -> list[float]:
    """1 for every completion whose last code block passes all of the row's `tests`, side by side.

    `tests` is Python source, or a list of it (asserts), that runs after the program in its interpreter; or a list of
    {"input", "output"}: the program then reads the one and must print the other, and each pair is a run. A completion
    without a code block fails. `limit_s` of the row is for a run, 4 seconds where it has none: a program that is still
    busy then has failed, so reward.timeout_s must leave room for all runs of a group.

    Not proof against a program that wants to cheat: one that ends with the words of a passed test, or that changes
    what `assert` sees, passes tests of the first kind; of {"input", "output"} the answers are not in its reach. What
    the sandbox keeps out, and what not, is said there.

    Raises:
        KeyError, TypeError: the row has no `tests`, or they are of neither kind.
        OSError: no process could be started.
    """
    tests = row["tests"]
    runs = [tests] if isinstance(tests, str) else tests
    if not isinstance(runs, list) or not runs or not all(isinstance(t, str) or _is_pair(t) for t in runs):
        raise TypeError(f"tests are {tests!r:.80}: neither Python source nor pairs of input and output")
    limits = Limits(wall_s=float(row.get("limit_s", 4.0)))
    with ThreadPoolExecutor(max_workers=min(len(completions), os.cpu_count() or 1)) as threads:
        return list(threads.map(lambda text: _passes(text, runs, limits), completions))


def _passes(completion: str, tests: list[Any], limits: Limits) -> float:
    blocks = BLOCK.findall(completion)
    if not blocks:
        return 0.0
    source = [test for test in tests if isinstance(test, str)]
    if source:
        done = f"passed {os.urandom(16).hex()}"
        script = "\n".join([blocks[-1], *source, f"print({json.dumps(chr(10) + done)})"])
        found = run_python(script, "", limits)
        if found is None or not found.rstrip().endswith(done):
            return 0.0
    for pair in tests:
        if isinstance(pair, dict):
            found = run_python(blocks[-1], pair["input"], limits)
            if found is None or found.split() != pair["output"].split():
                return 0.0
    return 1.0


def _is_pair(test: Any) -> bool:
    return isinstance(test, dict) and all(isinstance(test.get(key), str) for key in ("input", "output"))
