"""The loop of the offline recipes: draw, pack, train, checkpoint. Packs come from token rows on disk."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain import faults
from posttrain.compute.checkpoint import Checkpoints
from posttrain.data.order import draw
from posttrain.data.pack import pack
from posttrain.data.types import Sample
from posttrain.model.losses import Loss
from posttrain.workflow.ledger import Ledger
from posttrain.workflow.observers import Observers
from posttrain.workflow.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopPlan:
    """The numbers of an offline run."""

    num_steps: int
    samples_per_step: int
    pack_tokens: int
    seed: int
    checkpoint_every: int | None
    checkpoint_seconds: float


async def train(
    plan: LoopPlan,
    *,
    policy: Policy,
    samples: Sequence[Sample],
    loss: Loss,
    checkpoints: Checkpoints,
    observers: Observers,
) -> Ledger:
    """Train to `plan.num_steps`, from the last checkpoint if there is one; return the ledger.

    The global batch of step s is the packs of draws [s * samples_per_step, (s + 1) *
    samples_per_step): it depends on the seed and the step alone, not on the ranks.
    """
    ledger, first = Ledger(), 0
    found = checkpoints.latest()
    if found is not None:
        await policy.restore(found.uri)
        ledger, first = Ledger(found.state["ledger"]), found.step
    observers.restore(found.state["history"] if found else [])
    last_save = time.monotonic()
    for step in range(first, plan.num_steps):
        start = time.perf_counter()
        draws = [ledger.draw() for _ in range(plan.samples_per_step)]
        units = [(samples[draw(n, seed=plan.seed, num_rows=len(samples))],) for n in draws]
        packs = pack(units, pack_tokens=plan.pack_tokens)
        faults.point("loop.before_train")
        metrics = await policy.train_step(step, packs, loss)
        ledger.commit(packs, draws=len(draws))
        seconds = time.perf_counter() - start
        tokens = sum(p.num_tokens for p in packs)
        observers.step({"step": step, **metrics, "perf/tokens_per_s": tokens / seconds, "time/step_s": seconds})
        done = step + 1
        every = plan.checkpoint_every
        due = bool(every and done % every == 0) or time.monotonic() - last_save > plan.checkpoint_seconds
        if due or done == plan.num_steps:
            await policy.save(checkpoints, done, {"ledger": ledger.state(), "history": observers.history})
            last_save = time.monotonic()
    return ledger
