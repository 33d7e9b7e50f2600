"""The loop of the offline recipes: take packs, train, count, checkpoint."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from posttrain import faults
from posttrain.data.loader import Loader
from posttrain.data.pack import fill
from posttrain.model.losses import Loss
from posttrain.workflow.clock import Clock
from posttrain.workflow.held_out import HeldOut
from posttrain.workflow.ledger import Ledger
from posttrain.workflow.ledger_file import LedgerFile
from posttrain.workflow.observers import Observers
from posttrain.workflow.policy import Policy
from posttrain.workflow.saving import Saver, restore


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopPlan:
    """The numbers of an offline run."""

    num_steps: int
    packs_per_step: int
    pack_tokens: int


async def train(
    plan: LoopPlan,
    *,
    policy: Policy,
    load: Callable[[dict[str, Any] | None], AbstractContextManager[Loader]],
    loss: Loss,
    saver: Saver,
    ledger_file: LedgerFile,
    observers: Observers,
    held_out: HeldOut | None = None,
) -> Ledger:
    """Train to `plan.num_steps`, from the last checkpoint if there is one; return the ledger.

    The global batch of step s is the packs [s * packs_per_step, (s + 1) * packs_per_step) of
    the stream, on however many ranks.

    Args:
        load: a loader's state (None at the beginning) -> the loader that goes on from there.
        held_out: what is measured beside the training, as eval/*.

    Raises:
        DataError: the data end, are damaged, or hold too many bad rows.
        ComputeError: a worker died, hung, or produced NaN.
        PreemptedError, StorageError, CheckpointError: see Saver.after_step().
    """
    ledger, first, state = Ledger(), 0, None
    found = await restore(policy, saver.checkpoints)
    if found is not None:
        ledger, first, state = Ledger(found.state["ledger"]), found.step, found.state["loader"]
    observers.restore(found.state["history"] if found else [])
    ledger_file.restore(first)

    def kept() -> dict[str, Any]:
        ledger_file.flush()
        return {"ledger": ledger.state(), "loader": loader.state(), "history": observers.history}

    with load(state) as loader:
        clock = Clock()
        for step in range(first, plan.num_steps):
            with clock.phase("data_wait"):
                packs = loader.take(plan.packs_per_step)
            ledger.hand_out(sum(p.num_units for p in packs), loader.dropped)
            faults.point("loop.before_train")
            metrics = await policy.train_step(step, packs, loss)
            ledger_file.append({"step": step, **ledger.commit(packs, draws=[n for p in packs for n in p.draws])})
            assert ledger.balance() == 0, f"the ledger does not balance after step {step}: {ledger.state()}"
            if held_out is not None:
                with clock.phase("eval"):
                    metrics |= await held_out.measure(step, policy, loss, observers.history)
            metrics |= clock.metrics(metrics) | saver.metrics()
            observers.step({"step": step, **metrics, **_pack_metrics(packs, plan.pack_tokens, metrics)})
            observers.note(policy.notes)
            clock = Clock()  # a commit counts to the step that has to wait for it
            with clock.phase("checkpoint"):
                await saver.after_step(step + 1, kept)
                if held_out is not None:
                    held_out.prune(observers.history)
    ledger_file.close()
    return ledger


def _pack_metrics(packs: list, pack_tokens: int, times: dict[str, float]) -> dict[str, float]:
    tokens = sum(p.num_tokens for p in packs)
    named = {"data/tokens": tokens, "data/fill": fill(packs, pack_tokens=pack_tokens)}
    return named | {"perf/tokens_per_s": tokens / (times["time/step_s"] - times.get("time/eval_s", 0.0))}
