"""A flow of ours, with its config, hardware, retries and cards, whose steps have no program."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "flows"))

from metaflow import card, retry, step

from base import PostTrainFlow, main, own_config

OWN = "grpo_tiny.yaml"


class IdleFlow(PostTrainFlow):
    """The chain of flows/base.py; each task reads the typed config, as every real one does."""

    config = own_config(OWN)

    @step
    def start(self):
        """Read the config."""
        self.nodes = "one" if self.cfg.parallel.nodes == 1 else "many"
        self.next(self.prepare)

    @step
    def prepare(self):
        """One share."""
        self.parts = [self.cfg.seed]
        self.next(self.tokenize, foreach="parts")

    @retry(times=2, minutes_between_retries=0)
    @step
    def tokenize(self):
        """Read the config."""
        self.seed = self.cfg.seed
        self.next(self.merge_tokens)

    @card(type="blank", id="data")
    @step
    def merge_tokens(self, inputs):
        """Read the config."""
        self.merge_artifacts(inputs)
        self.seed = self.cfg.seed
        self.next(self.warmup)

    @card(type="blank", id="training")
    @retry(times=2, minutes_between_retries=0)
    @step
    def warmup(self):
        """Read the config."""
        self.seed = self.cfg.seed
        self.next({"one": self.train, "many": self.gang}, condition="nodes")

    @card(type="blank", id="training")
    @retry(times=2, minutes_between_retries=0)
    @step
    def train(self):
        """Read the config."""
        self.seed = self.cfg.seed
        self.next(self.evaluate)

    @card(type="blank", id="evaluation")
    @retry(times=2, minutes_between_retries=0)
    @step
    def evaluate(self):
        """Read the config."""
        self.seed = self.cfg.seed
        self.next(self.export)

    @card(type="blank", id="export")
    @step
    def export(self):
        """Read the config."""
        self.seed = self.cfg.seed
        self.next(self.end)

    @step
    def end(self):
        """Read the config."""
        self.seed = self.cfg.seed


if __name__ == "__main__":
    main(IdleFlow, config=OWN)
