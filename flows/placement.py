"""Where steps run is in the config's `parallel`, not in the flows: decorators are added from it."""

from metaflow import FlowMutator

TRAINING = ("warmup", "train", "train_nodes", "evaluate")
"""Steps that bring up Ray and take the accelerators; the others run on a CPU."""


class on_hardware(FlowMutator):  # noqa: N801  (a decorator, named like Metaflow's own)
    """Turn `parallel` into @resources and, off the laptop, @kubernetes or @batch."""

    def pre_mutate(self, mutable_flow):
        wants = dict(mutable_flow.configs)["config"]["parallel"]
        for name, step in mutable_flow.steps:
            step.add_decorator("resources", deco_kwargs=_resources(wants, training=name in TRAINING))
            if wants["backend"] != "local":
                place = {"image": wants["image"]}
                if wants["backend"] == "batch":
                    place["queue"] = wants["queue"]
                step.add_decorator(wants["backend"], deco_kwargs={k: v for k, v in place.items() if v})


def _resources(wants, *, training: bool) -> dict:
    if not training:
        return {"cpu": 2, "memory": 8 * 1024}
    asks = {"cpu": wants["cpus_per_node"], "memory": wants["memory_gib"] * 1024}
    if wants["gpus_per_node"]:
        asks["gpu"] = wants["gpus_per_node"]
    return asks
