"""A flow whose one task tells what its environment is: how Metaflow's own S3 store is set up, and a variable."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "flows"))

from metaflow import FlowSpec, step

from base import main, own_config
from placement import on_hardware

OWN = "sft_tiny.yaml"


@on_hardware
class ProbeFlow(FlowSpec):
    """Placed as every flow is."""

    config = own_config(OWN)

    @step
    def start(self):
        """Read what Metaflow made of its environment."""
        from metaflow import metaflow_config

        names = ("S3_RETRY_COUNT", "S3_TRANSIENT_RETRY_COUNT", "S3_CLIENT_RETRY_CONFIG")
        told = {name: getattr(metaflow_config, name) for name in names}
        print("PROBE", json.dumps(told | {"POSTTRAIN_PROBE": os.environ.get("POSTTRAIN_PROBE")}))
        self.next(self.end)

    @step
    def end(self):
        """Nothing more."""


if __name__ == "__main__":
    main(ProbeFlow, config=OWN)
