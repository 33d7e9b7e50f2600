"""From the config's `tracking` to the observers of one phase of a run."""

import re
from contextlib import AbstractContextManager
from hashlib import sha256

from posttrain import storage
from posttrain.config import RunConfig
from posttrain.workflow.trackers import make_trackers
from posttrain.workflow.tracking import RunFacts, Tracking, tracked


def tracking(config: RunConfig, *, root: str, phase: str) -> AbstractContextManager[list[Tracking]]:
    """Observers for "warmup" or a recipe. A phase has one run in a tracker, named by the folder of the run's files."""
    folder = root if storage.is_s3(root) else root.rstrip("/")
    name = "-".join([*folder.split("/")[-2:], phase])
    readable = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[-40:]
    facts = RunFacts(
        run_id=f"{readable}-{sha256(f'{folder}/{phase}'.encode()).hexdigest()[:10]}",
        name=name,
        folder=folder,
        config=config.model_dump(mode="json"),
        first_step=0,
    )
    return tracked(make_trackers(**config.tracking.model_dump()), facts)
