"""A flow that asks for several nodes as soon as it starts: for a test of what a gang is on AWS Batch.

It runs from a copy of flows/, as a code package holds the folder of its flow.
"""

from metaflow import FlowSpec, parallel, step

from base import main, own_config
from placement import on_hardware

OWN = "grpo_tiny.yaml"


@on_hardware
class GangFlow(FlowSpec):
    """Placed as every flow is."""

    config = own_config(OWN)

    @step
    def start(self):
        """Ask for the nodes."""
        self.next(self.train_nodes, num_parallel=self.config.parallel.nodes)

    @parallel
    @step
    def train_nodes(self):
        """One node of the gang."""
        self.next(self.gather)

    @step
    def gather(self, inputs):
        """Nothing to keep."""
        self.next(self.end)

    @step
    def end(self):
        """Nothing more."""


if __name__ == "__main__":
    main(GangFlow, config=OWN)
