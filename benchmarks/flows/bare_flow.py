"""Metaflow alone: as many tasks and cards as a flow of ours has, and nothing in them."""

from metaflow import FlowSpec, card, step


class BareFlow(FlowSpec):
    """The chain of flows/base.py on one node."""

    @step
    def start(self):
        """Nothing, as all that follow."""
        self.next(self.prepare)

    @step
    def prepare(self):
        """One share."""
        self.parts = [0]
        self.next(self.tokenize, foreach="parts")

    @step
    def tokenize(self):
        """Nothing."""
        self.next(self.merge_tokens)

    @card(type="blank", id="data")
    @step
    def merge_tokens(self, inputs):
        """Nothing."""
        self.next(self.warmup)

    @card(type="blank", id="training")
    @step
    def warmup(self):
        """Nothing."""
        self.next(self.train)

    @card(type="blank", id="training")
    @step
    def train(self):
        """Nothing."""
        self.next(self.evaluate)

    @card(type="blank", id="evaluation")
    @step
    def evaluate(self):
        """Nothing."""
        self.next(self.export)

    @card(type="blank", id="export")
    @step
    def export(self):
        """Nothing."""
        self.next(self.end)

    @step
    def end(self):
        """Nothing."""


if __name__ == "__main__":
    BareFlow()
