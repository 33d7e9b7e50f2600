"""Where steps run is in the config's `parallel`, not in the flows: decorators are added from it."""

import os

from metaflow import FlowMutator

TRAINING = ("warmup", "teach", "train", "train_nodes", "evaluate")
"""Steps that take the accelerators; the others run on a CPU."""

BACKENDS = {"kubernetes": "kubernetes", "aws-batch": "batch"}
"""What Metaflow calls the place in a task's environment -> what the config calls it."""


class on_hardware(FlowMutator):  # noqa: N801  (a decorator, named like Metaflow's own)
    """Turn `parallel` into @resources and, off the laptop, @kubernetes or @batch."""

    def pre_mutate(self, mutable_flow):
        config = dict(mutable_flow.configs)["config"]
        wants = config["parallel"]
        for name, step in mutable_flow.steps:
            idle = {"warmup": config["warmup"] is None, "teach": not config["method"].get("top_k")}
            trains = name in TRAINING and not idle.get(name, False)
            step.add_decorator("resources", deco_kwargs=_resources(wants, training=trains))
            if wants["backend"] != "local":
                place = {"image": wants["image"]}
                if wants["backend"] == "batch":
                    place["queue"] = wants["queue"]
                step.add_decorator(wants["backend"], deco_kwargs={k: v for k, v in place.items() if v})


def where_it_runs() -> dict:
    """The keys of `parallel` that this task knows better: `--with kubernetes`, `--with batch` and Argo move a
    step after the config was read. Nothing on a laptop."""
    backend = BACKENDS.get(os.environ.get("METAFLOW_RUNTIME_ENVIRONMENT", ""))
    if backend is None:
        return {}
    queue = os.environ.get("AWS_BATCH_JQ_NAME")  # AWS Batch sets it in every container
    return {"backend": backend, **({"queue": queue} if queue else {})}


def _resources(wants, *, training: bool) -> dict:
    if not training:
        return {"cpu": 2, "memory": 8 * 1024}
    memory = wants["memory_gib"] * 1024
    # A container's /dev/shm is 64 MiB unless asked for; Ray's object store and NCCL live in it.
    asks = {"cpu": wants["cpus_per_node"], "memory": memory, "shared_memory": memory // 2}
    if wants["gpus_per_node"]:
        asks["gpu"] = wants["gpus_per_node"]
    return asks
