"""A flow of ours, with its config, hardware, retries and cards, whose steps have no program.

Each task looks into the config that Metaflow hands it; typed_flow.py also makes the typed one of it, for the program
that a real step would call.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "flows"))

from metaflow import card, retry, step

from base import PostTrainFlow, main, own_config

OWN = "grpo_tiny.yaml"


class IdleFlow(PostTrainFlow):
    """The chain of flows/base.py."""

    config = own_config(OWN)

    @step
    def start(self):
        """Read the config."""
        self.nodes = "one" if self.config.parallel.nodes == 1 else "many"
        self.read()
        self.next(self.prepare)

    @step
    def prepare(self):
        """One share."""
        self.parts = [0]
        self.read()
        self.next(self.tokenize, foreach="parts")

    @retry(times=2, minutes_between_retries=0)
    @step
    def tokenize(self):
        """Read the config."""
        self.read()
        self.next(self.merge_tokens)

    @card(type="blank", id="data")
    @step
    def merge_tokens(self, inputs):
        """Read the config."""
        self.merge_artifacts(inputs)
        self.read()
        self.next(self.warmup)

    @card(type="blank", id="training")
    @retry(times=2, minutes_between_retries=0)
    @step
    def warmup(self):
        """Read the config."""
        self.read()
        self.next({"one": self.train, "many": self.gang}, condition="nodes")

    @card(type="blank", id="training")
    @retry(times=2, minutes_between_retries=0)
    @step
    def train(self):
        """Read the config."""
        self.read()
        self.next(self.evaluate)

    @card(type="blank", id="evaluation")
    @retry(times=2, minutes_between_retries=0)
    @step
    def evaluate(self):
        """Read the config."""
        self.read()
        self.next(self.export)

    @card(type="blank", id="export")
    @step
    def export(self):
        """Read the config."""
        self.read()
        self.next(self.end)

    @step
    def end(self):
        """Read the config."""
        self.read()

    def read(self):
        """What each task does."""
        self.seed = self.config.seed


if __name__ == "__main__":
    main(IdleFlow, config=OWN)
