"""Several optimizer steps on one batch, and what is said of them."""

import asyncio

from posttrain.model.losses.sft import SFTLoss
from posttrain.workflow.passes import train_passes


class Counting:
    """A policy whose loss falls by one a step."""

    def __init__(self):
        self.taken = []

    async def train_step(self, step, packs, loss):
        self.taken.append((step, packs))
        return {"loss": 10.0 - len(self.taken), "time/forward_s": 2.0}


def test_passes_are_steps_at_one_rate_whose_metrics_are_means_and_whose_times_add_up():
    policy = Counting()
    found = asyncio.run(train_passes(policy, 7, ["a", "b"], SFTLoss(), passes=3))  # pyright: ignore
    assert policy.taken == [(7, ["a", "b"])] * 3
    assert found == {"loss": 8.0, "time/forward_s": 6.0}
