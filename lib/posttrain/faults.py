"""Named places where a test may kill the process; inert unless POSTTRAIN_FAULT names one.

POSTTRAIN_FAULT="checkpoint.before_manifest@3" kills with SIGKILL at the third passage.
"""

import os
import signal
from collections import Counter

_passed: Counter[str] = Counter()


def point(name: str) -> None:
    """Mark a place. Costs one dictionary lookup when no fault is planned."""
    plan = os.environ.get("POSTTRAIN_FAULT")
    if plan is None:
        return
    wanted, _, passage = plan.partition("@")
    if wanted != name:
        return
    _passed[name] += 1
    if _passed[name] == int(passage or 1):
        os.kill(os.getpid(), signal.SIGKILL)
