"""When a deployed flow starts is in the config's `retrain`, not in the flow: decorators are added from it."""

import os

from metaflow import FlowMutator, metaflow_config

SCHEDULES = "METAFLOW_ARGO_WORKFLOWS_USE_SCHEDULES"
"""Argo 4 knows no other field than `schedules`, which 3.6 has too; for an older one set this to false."""


class when_due(FlowMutator):  # noqa: N801  (a decorator, named like Metaflow's own)
    """Turn `retrain.schedule`, `after` and `event` into @schedule, @trigger_on_finish and @trigger."""

    def pre_mutate(self, mutable_flow):
        wants = dict(mutable_flow.configs)["config"]["retrain"]
        if wants["schedule"] is not None:
            mutable_flow.add_decorator("schedule", deco_kwargs={"cron": wants["schedule"]})
            if SCHEDULES not in os.environ:
                # Read from the environment when Metaflow was imported, and by its Argo client when that is.
                metaflow_config.ARGO_WORKFLOWS_USE_SCHEDULES = True
        if wants["after"] is not None:
            mutable_flow.add_decorator("trigger_on_finish", deco_kwargs={"flow": wants["after"]})
        if wants["event"] is not None:
            mutable_flow.add_decorator("trigger", deco_kwargs={"event": wants["event"]})
