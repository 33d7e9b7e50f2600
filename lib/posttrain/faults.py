"""Named places where a test may break the process; inert unless POSTTRAIN_FAULT names one.

POSTTRAIN_FAULT="checkpoint.before_manifest@3" kills with SIGKILL at the third passage. A place that several ranks
pass may be named with one: "policy.train_step.1@3". "stop:" before the name stops the process as SIGSTOP does, for
ever or until someone continues it; "term:" sends it SIGTERM, as a scheduler does.
"""

import os
import signal
from collections import Counter

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}

_passed: Counter[str] = Counter()


def point(name: str, rank: int | None = None) -> None:
    """Mark a place. Costs one dictionary lookup when no fault is planned."""
    plan = os.environ.get("POSTTRAIN_FAULT")
    if plan is None:
        return
    kind, _, place = plan.rpartition(":")
    wanted, _, passage = place.partition("@")
    if wanted not in (name, f"{name}.{rank}"):
        return
    _passed[name] += 1
    if _passed[name] == int(passage or 1):
        os.kill(os.getpid(), SIGNALS[kind or "kill"])
