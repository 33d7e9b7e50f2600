"""The RL controller: when to generate, when to train, when to sync. Holds control; the actors hold tensors.

Synchronous on-policy training: every step samples its groups with the weights that the
step before produced, takes one optimizer step on them, and sends the new weights back.
"""

import asyncio
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from posttrain import faults
from posttrain.data.advantage import Advantages
from posttrain.data.pack import fill, pack
from posttrain.data.rollout import group_units
from posttrain.data.types import Unit
from posttrain.errors import SyncError
from posttrain.model.losses import Loss
from posttrain.workflow.clock import Clock
from posttrain.workflow.credit import Credit
from posttrain.workflow.evaluate import Evaluator
from posttrain.workflow.ledger import Ledger
from posttrain.workflow.ledger_file import LedgerFile
from posttrain.workflow.observers import Metrics, Observers
from posttrain.workflow.passes import train_passes
from posttrain.workflow.policy import Policy
from posttrain.workflow.rollouts import Group, Prompts, RolloutMaker
from posttrain.workflow.saving import Saver, restore


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The numbers of a GRPO run."""

    num_steps: int
    prompts_per_step: int
    group_size: int
    advantages: Advantages
    weigh_by_sequence: bool
    pack_tokens: int
    eval_every: int
    credit: Credit | None = None
    """What gives every token an advantage of its own."""
    passes: int = 1
    """Optimizer steps on each step's batch."""


class Controller:
    """Drives policy, generators and rewards through `plan.num_steps` steps, exactly once each."""

    def __init__(
        self,
        plan: Plan,
        *,
        policy: Policy,
        maker: RolloutMaker,
        evaluator: Evaluator,
        loss: Loss,
        saver: Saver,
        ledger_file: LedgerFile,
        observers: Observers,
    ):
        self.plan, self.policy, self.maker = plan, policy, maker
        self.evaluator, self.loss, self.saver, self.observers = evaluator, loss, saver, observers
        self.ledger, self.ledger_file = Ledger(), ledger_file
        self.version = 0

    async def run(self, prompts: Prompts) -> None:
        """Restore the last checkpoint if there is one, sync, and train to the end.

        "eval/reward" of a step is that of the weights its rollouts were sampled with; of
        the last step that of the final weights.

        Raises:
            ComputeError: a worker died, hung, or produced NaN.
            RewardError: the reward's failure budget is spent.
            SyncError: the generators do not hold the policy's weights.
            PreemptedError, StorageError, CheckpointError: see Saver.after_step().
        """
        first = await self._restore()
        await self._sync()
        clock = Clock()
        for step in range(first, self.plan.num_steps):
            measured: Metrics = {}
            if step % self.plan.eval_every == 0:
                with clock.phase("eval"):
                    measured["eval/reward"] = await self.evaluator.quick()
            groups = await self.maker.collect(
                prompts, self.ledger, clock, groups=self.plan.prompts_per_step, group_size=self.plan.group_size
            )
            metrics = await self._train(step, groups)
            with clock.phase("sync"):
                self.version += 1
                await self._sync()
            if step + 1 == self.plan.num_steps:
                with clock.phase("eval"):
                    measured["eval/reward"] = await self.evaluator.quick()
            metrics |= measured | clock.metrics(metrics) | self.saver.metrics()
            self.observers.step({"step": step, **metrics})
            self.observers.note(self.policy.notes)
            self.observers.rollouts(step, groups)
            clock = Clock()  # a commit counts to the step that has to wait for it
            with clock.phase("checkpoint"):
                await self.saver.after_step(step + 1, self._kept)
        self.ledger_file.close()

    async def _train(self, step: int, groups: list[Group]) -> Metrics:
        units: list[Unit] = []
        rewards = [[rollout.reward for rollout in group if rollout.reward is not None] for group in groups]
        for group, found in zip(groups, rewards, strict=True):
            assert len(found) == self.plan.group_size, f"group of prompt {group[0].prompt.uid} is not fully scored"
        for group, advantages in zip(groups, self.plan.advantages(rewards), strict=True):
            units += group_units(group, advantages, by_sequence=self.plan.weigh_by_sequence)
        packs = pack(units, pack_tokens=self.plan.pack_tokens)
        faults.point("controller.before_train")
        credited: Metrics = {}
        if self.plan.credit is not None:
            packs, credited = await self.plan.credit.assign(self.policy, packs)
        trained = credited | await train_passes(self.policy, step, packs, self.loss, passes=self.plan.passes)
        row = self.ledger.commit(packs, draws=[group[0].prompt.uid for group in groups])
        self.ledger_file.append({"step": step, **row})
        assert self.ledger.balance() == 0, f"the ledger does not balance after step {step}: {self.ledger.state()}"
        filled = fill(packs, pack_tokens=self.plan.pack_tokens)
        named = {name if "/" in name or name in ("loss", "lr") else f"policy/{name}": v for name, v in trained.items()}
        return _rollout_metrics(groups) | named | {"data/packs": len(packs), "data/fill": filled}

    async def _sync(self) -> None:
        """Send the policy's weights to every generator and prove that they arrived."""
        timeout_s = self.policy.timeout_s
        dtype = (await self.maker.generators.call("weight_dtype", timeout_s=timeout_s))[0]
        weights = self.policy.start_weights(dtype)
        expected, held = await asyncio.gather(
            self.policy.weights_digest(dtype),
            self.maker.generators.call("sync", self.version, weights, timeout_s=timeout_s),
        )
        for rank, got in enumerate(held):
            if got != expected:
                raise SyncError(
                    f"generator {rank} holds {got[:12]} after the sync to version {self.version}, "
                    f"the policy sent {expected[:12]}"
                )

    async def _restore(self) -> int:
        found = await restore(self.policy, self.saver.checkpoints)
        self.ledger_file.restore(found.step if found else 0)
        if found is None:
            self.observers.restore([])
            return 0
        self.ledger = Ledger(found.state["ledger"])
        self.version = found.state["version"]
        self.observers.restore(found.state["history"])
        return found.step

    def _kept(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the tensors; the ledger's lines of its steps are durable."""
        self.ledger_file.flush()
        return {"ledger": self.ledger.state(), "version": self.version, "history": self.observers.history}


def _rollout_metrics(groups: list[Group]) -> Metrics:
    """Rewards, their spread, parts, lengths and how sampling ended."""
    rollouts = [rollout for group in groups for rollout in group]
    rewards = [[r.reward for r in group if r.reward is not None] for group in groups]
    lengths = [len(r.token_ids) for r in rollouts]
    parts = sorted({name for r in rollouts for name in r.parts} - {"reward"})
    return {
        "reward/mean": fmean(x for group in rewards for x in group),
        "reward/group_std": fmean(pstdev(group) for group in rewards),
        "reward/groups_without_signal": fmean(len(set(group)) == 1 for group in rewards),
        **{f"reward/{name}": fmean(r.parts[name] for r in rollouts if name in r.parts) for name in parts},
        "rollout/tokens_mean": fmean(lengths),
        "rollout/tokens_max": float(max(lengths)),
        "rollout/truncated": fmean(r.finish_reason == "length" for r in rollouts),
    }
