"""A run's tags: what it is found by in the Metaflow UI, and with `Flow("GRPOFlow").runs("recipe:grpo")`."""

from typing import TYPE_CHECKING

from metaflow import current
from metaflow.exception import MetaflowException

if TYPE_CHECKING:
    from posttrain.config import Origin


def tag_run(labels: dict[str, str]) -> None:
    """Set a tag `name:value` for each label, in place of what the run has of that name. Other tags stay.

    All labels each time, not the new one alone: where a container keeps metadata of its own, it begins without tags.
    Metadata that takes no tag costs a warning: a run does not end for want of its names.
    """
    try:
        run = current.run
        assert run is not None, "a step is running"
        new = {f"{name}:{value}" for name, value in labels.items()}
        old = {tag for tag in run.user_tags if tag.partition(":")[0] in labels}
        if old != new:  # Metaflow refuses a call that changes nothing
            run.replace_tags(sorted(old - new), sorted(new - old))
    except MetaflowException as error:
        print(f"WARNING: this run has no tags: {error}", flush=True)


def name_of(model: "Origin") -> str:
    """What a run starts from, short enough for a tag: fresh, FLOW/RUN of a chain, or the last part of a path."""
    if model.path is None:
        return "fresh"
    path = model.path.rstrip("/")
    return path.removeprefix("run:") if path.startswith("run:") else path.rpartition("/")[2]
