"""Where steps run is in the config's `parallel`, not in the flows: decorators are added from it."""

import json
import os

from metaflow import FlowMutator, current
from metaflow.exception import MetaflowException
from metaflow.metaflow_config_funcs import config_values

TRAINING = ("warmup", "teach", "train", "train_nodes", "evaluate")
"""Steps that take the accelerators; the others run on a CPU."""

BACKENDS = {"kubernetes": "kubernetes", "aws-batch": "batch"}
"""What Metaflow calls the place in a task's environment -> what the config calls it."""

LONG_ID = 6
"""Digits that stand nowhere else in a container's command."""

S3_BOUNDS = {
    "METAFLOW_S3_RETRY_COUNT": "6",
    "METAFLOW_S3_TRANSIENT_RETRY_COUNT": "6",
    "METAFLOW_S3_CLIENT_RETRY_CONFIG": json.dumps({"total_max_attempts": 2, "mode": "standard"}),
}
"""What every task's Metaflow gets where nobody has set it. Its own 20 repetitions pause for 80 minutes on one key,
while GPUs are held; six pause for two. posttrain's own files have a budget of their own (posttrain/s3.py)."""


class CannotPlace(MetaflowException):
    """Where the config wants steps is no place for them."""

    headline = "posttrain refused to run"


class on_hardware(FlowMutator):  # noqa: N801  (a decorator, named like Metaflow's own)
    """Turn `parallel` into @resources, @environment, what it says in `decorators` and, off the laptop, @kubernetes or
    @batch."""

    def pre_mutate(self, mutable_flow):
        config = dict(mutable_flow.configs)["config"].to_dict()
        for name, step in mutable_flow.steps:
            idle = {"warmup": config["warmup"] is None, "teach": not config["method"].get("top_k")}
            trains = name in TRAINING and not idle.get(name, False)
            for kind, arguments in _decorators(config["parallel"], training=trains).items():
                added = step.add_decorator(kind, deco_kwargs=arguments, duplicates=step.OVERRIDE)
                if unknown := sorted(arguments.keys() - added.defaults.keys()):  # Metaflow would not look at them
                    raise CannotPlace(
                        f"parallel.decorators: {kind} has no {', '.join(unknown)}; known: {', '.join(added.defaults)}"
                    )


def where_it_runs() -> dict:
    """The keys of `parallel` that this task knows better: `--with kubernetes`, `--with batch` and Argo move a
    step after the config was read. Nothing on a laptop."""
    backend = BACKENDS.get(os.environ.get("METAFLOW_RUNTIME_ENVIRONMENT", ""))
    if backend is None:
        return {}
    queue = os.environ.get("AWS_BATCH_JQ_NAME")  # AWS Batch sets it in every container
    return {"backend": backend, **({"queue": queue} if queue else {})}


def refuse_gang_of_small_ids(backend: str, nodes: int) -> None:
    """Metaflow makes the workers' command on AWS Batch by replacing the task's id wherever it stands as text (2.19.39):
    a small number stands in many places, the shell fails, and node 0 would wait with its GPUs."""
    if backend == "batch" and nodes > 1 and len(current.task_id) < LONG_ID:
        raise CannotPlace(
            f"parallel.nodes = {nodes} on AWS Batch with task ids as small as {current.task_id}: Metaflow would break "
            "the command of all nodes but the first. Use a metadata service whose sequence of tasks starts at a million"
        )


def _decorators(wants: dict, *, training: bool) -> dict[str, dict]:
    """Metaflow's decorators of one step -> their arguments."""
    asked: dict[str, dict] = {}
    for steps in ("all", "training") if training else ("all",):
        for kind, arguments in wants["decorators"].get(steps, {}).items():
            before = asked.get(kind, {})
            both = before.get("vars", {}) | arguments.get("vars", {})  # of @environment, from both places
            asked[kind] = before | arguments | ({"vars": both} if both else {})
    if "retry" in asked:
        asked["retry"] = {"minutes_between_retries": 0} | asked["retry"]
    asked["environment"] = {"vars": _s3_bounds() | asked.get("environment", {}).get("vars", {})}
    given = {backend: asked.pop(backend, {}) for backend in BACKENDS.values()}
    if wants["backend"] != "local":
        place = {"image": wants["image"], "queue": wants["queue"] if wants["backend"] == "batch" else None}
        asked[wants["backend"]] = {k: v for k, v in place.items() if v} | given[wants["backend"]]
    return {"resources": _resources(wants, training=training), **asked}


def _s3_bounds() -> dict[str, str]:
    """S3_BOUNDS, or what this machine's environment or Metaflow configuration says of them."""
    configured = dict(config_values())
    return {name: os.environ.get(name, configured.get(name, bound)) for name, bound in S3_BOUNDS.items()}


def _resources(wants, *, training: bool) -> dict:
    if not training:
        return {"cpu": 2, "memory": 8 * 1024}
    memory = wants["memory_gib"] * 1024
    # A container's /dev/shm is 64 MiB unless asked for; Ray's object store and NCCL live in it.
    asks = {"cpu": wants["cpus_per_node"], "memory": memory, "shared_memory": memory // 2}
    if wants["gpus_per_node"]:
        asks["gpu"] = wants["gpus_per_node"]
    return asks
