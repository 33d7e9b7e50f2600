"""A flow whose two tasks read a plain value of the config, one with a card: for a test of what processes import."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "flows"))

from metaflow import FlowSpec, card, current, step

from base import main, own_config
from placement import on_hardware

OWN = "sft_tiny.yaml"


@on_hardware
class LightFlow(FlowSpec):
    """Placed as every flow is."""

    config = own_config(OWN)

    @card(type="blank", id="data")
    @step
    def start(self):
        """Draw a card while the task runs, as training does."""
        self.seed = self.config.seed
        current.card["data"].refresh()
        self.next(self.end)

    @step
    def end(self):
        """Nothing more."""


if __name__ == "__main__":
    main(LightFlow, config=OWN)
