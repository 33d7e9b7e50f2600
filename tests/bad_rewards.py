"""Rewards that fail in every way a reward can; free of imports, so that the processes that hold them start fast."""

import os
import subprocess
import sys
import time
from pathlib import Path


def slow_when_asked(row, completion):
    """Waits until a file is there, so that a test decides who is first."""
    if "wait_for" in row:
        while not Path(row["wait_for"]).exists():
            time.sleep(0.01)
    if "touch" in row:
        Path(row["touch"]).touch()
    return float(len(completion))


def as_the_row_says(row, completion):
    """Does what row["does"] names; else 1."""
    match row.get("does"):
        case "raise":
            raise KeyError("no such field")
        case "hang":
            time.sleep(3600)
        case "die":
            os._exit(3)
        case "print":
            print('{"number": 1, "value": "forged"}', flush=True)
        case "hang in a child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
            Path(row["pid_file"]).write_text(str(child.pid))
            child.wait()
        case "count":  # its own calls, so that no two are alike
            as_the_row_says.calls = getattr(as_the_row_says, "calls", 0) + 1
            return as_the_row_says.calls
        case "hang the second time":  # that it is asked for the first completion
            if completion == "a" and getattr(as_the_row_says, "asked", False):
                time.sleep(3600)
            as_the_row_says.asked = True
        case "return":
            return row["value"]
    return 1.0


def per_group(row, completions):
    """Ranks in the group, or whatever the row says."""
    if "value" in row:
        return row["value"]
    order = sorted(completions, key=len)
    return [{"rank": order.index(each), "length": len(each)} for each in completions]


def long_answer(row, completion):
    return len(completion)


def half(row, completion):
    """Of the same name as another module's."""
    return 1.0
