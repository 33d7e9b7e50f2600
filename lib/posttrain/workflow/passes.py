"""Several optimizer steps on one global batch: PPO's epochs, GRPO's mu."""

from collections.abc import Sequence

from posttrain.data.types import Pack
from posttrain.model.losses import Loss
from posttrain.workflow.observers import Metrics
from posttrain.workflow.policy import Policy


async def train_passes(policy: Policy, step: int, packs: Sequence[Pack], loss: Loss, *, passes: int) -> Metrics:
    """`passes` optimizer steps over the whole batch, at the learning rate of `step`.

    No checkpoint comes between them, so a resumed run does all of a batch's passes again, or none.

    Returns:
        Means over the passes, of times their sum; the first pass alone is on policy.
    """
    found = [await policy.train_step(step, packs, loss) for _ in range(passes)]
    sums = {name: sum(each[name] for each in found) for name in found[0]}
    return {name: total if name.startswith("time/") else total / passes for name, total in sums.items()}
