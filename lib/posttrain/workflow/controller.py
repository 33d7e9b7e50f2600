"""The RL controller: when to generate, when to train, when to sync. Holds control; the actors hold tensors.

One loop trains synchronously and asynchronously. Every step trains the next batch of groups in draw order, takes one
optimizer step on it, and sends the new weights to the generators. `max_staleness` is how many steps ahead groups may
be begun (workflow/group_buffer.py has the bound and its proof): with 0 generators and trainer take turns; with more,
generators work while the trainer trains, on weights that are a little older.
"""

import asyncio
from dataclasses import dataclass
from functools import partial
from statistics import fmean, pstdev
from typing import Any

from posttrain import faults
from posttrain.data.advantage import Advantages
from posttrain.data.constraint import Constraint
from posttrain.data.pack import fill, pack
from posttrain.data.rollout import group_units
from posttrain.data.types import Unit
from posttrain.errors import StalenessError
from posttrain.model.losses import Loss
from posttrain.workflow.clock import Clock
from posttrain.workflow.credit import Credit
from posttrain.workflow.evaluate import Evaluator
from posttrain.workflow.group_buffer import GroupBuffer
from posttrain.workflow.ledger import Ledger
from posttrain.workflow.ledger_file import LedgerFile
from posttrain.workflow.observers import Metrics, Observers
from posttrain.workflow.passes import train_passes
from posttrain.workflow.policy import Policy
from posttrain.workflow.rollouts import Group, Prompts, RolloutMaker
from posttrain.workflow.saving import Saver, restore
from posttrain.workflow.supervise import supervised
from posttrain.workflow.weight_push import Way, WeightPush

STALL_DEADLINES = 4
"""Deadlines of one call after which a run stops in which no group came to an end: a group may wait for a call before
its own, for its own, for a generator that is replaced, and for its reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The numbers of a GRPO run."""

    num_steps: int
    prompts_per_step: int
    group_size: int
    max_staleness: int
    advantages: Advantages
    weigh_by_sequence: bool
    pack_tokens: int
    eval_every: int
    constraint: Constraint | None = None
    """That the generators obey: the policy's distribution is renormalised over what it allows."""
    credit: Credit | None = None
    """What gives every token an advantage of its own."""
    passes: int = 1
    """Optimizer steps on each step's batch."""
    sync: Way = "store"
    """How weights reach the generators (workflow/weight_push.py)."""
    adapters: bool = False
    """Once they hold the weights that stand still, they get adapters alone."""
    sleep: bool = False
    """Generators give their GPU's memory back while the policy trains."""


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
        self.plan, self.policy, self.maker, self.generators = plan, policy, maker, maker.generators
        self.evaluator, self.loss, self.saver, self.observers = evaluator, loss, saver, observers
        self.push = WeightPush(policy, maker.generators, way=plan.sync, adapters=plan.adapters)
        self.ledger, self.ledger_file = Ledger(), ledger_file
        self.version = 0
        """Optimizer steps that the policy has taken."""
        self.synced = 0
        """All generators hold the weights of this version or newer."""
        self._weights = asyncio.Lock()
        """Held while the policy's weights change or are sent: a generator that is replaced meanwhile waits."""

    async def run(self, prompts: Prompts) -> None:
        """Restore the last checkpoint if there is one, sync, and train to the end.

        "eval/reward" is of the weights of "eval/version": those that the step began with, after the last step the
        final ones.

        Raises:
            ComputeError: a worker died, hung, or produced NaN.
            RewardError: the reward's failure budget is spent.
            SyncError: the generators do not hold the policy's weights.
            StalenessError: a rollout is older than max_staleness; it is not trained.
            PreemptedError, StorageError, CheckpointError: see Saver.after_step().
        """
        first = await self._restore()
        self._dtype = await self.generators.weight_dtype()
        self.generators.send_weights = partial(self._sync, dead_only=True)
        await self._sync()
        clock = Clock()
        try:
            async with supervised() as self.tasks:
                for step in range(first, self.plan.num_steps):
                    groups, metrics = await self._step(step, prompts, clock)
                    metrics |= clock.metrics(metrics) | self.saver.metrics() | self.maker.metrics()
                    self.observers.step({"step": step, **metrics})
                    self.observers.note(self.policy.notes)
                    self.observers.note(self.maker.notes)
                    self.observers.rollouts(step, groups, self.maker.take_dropped())
                    clock = Clock()  # a commit counts to the step that has to wait for it
                    with clock.phase("checkpoint"):
                        await self.saver.after_step(step + 1, self._kept)
        finally:
            await self.generators.close()
        self.ledger_file.close()

    async def _step(self, step: int, prompts: Prompts, clock: Clock) -> tuple[list[Group], Metrics]:
        measuring = self.tasks.create_task(self.evaluator.quick()) if step % self.plan.eval_every == 0 else None
        if measuring and not self.plan.max_staleness:  # in turn, as everything is
            with clock.phase("eval"):
                await measuring
        self._admit(prompts)
        groups = await self._next_batch(clock)
        async with self._weights:
            metrics = await self._train(step, groups)
            self.version += 1
        if measuring:  # before the generators get other weights than it measures
            with clock.phase("eval"):
                metrics |= await measuring
        with clock.phase("sync"):
            await self._sync()
        if step + 1 == self.plan.num_steps:
            with clock.phase("eval"):
                metrics |= await self.evaluator.quick()
        return groups, metrics

    def _admit(self, prompts: Prompts) -> None:
        """Begin all groups that may be begun, each in a task of its own."""
        for uid in self.buffer.admit(self.synced):
            self.tasks.create_task(self._make(uid, prompts))

    async def _make(self, uid: int, prompts: Prompts) -> None:
        began = partial(self.ledger.move, uid, "in_flight")
        self.buffer.finish(uid, await self.maker.make(prompts[uid], self.plan.group_size, began=began))
        self._admit(prompts)  # in place of what was dropped

    async def _next_batch(self, clock: Clock) -> list[Group]:
        """The groups of this step; the wait is "generate" while a generator works, else "reward"."""
        busy = self.generators.busy.total()
        with clock.phase("reward"):
            groups = await self.buffer.next_batch(stall_s=STALL_DEADLINES * self.generators.timeout_s)
        clock.move("reward", "generate", self.generators.busy.total() - busy)
        return groups

    async def _train(self, step: int, groups: list[Group]) -> Metrics:
        staleness = self._staleness(step, groups)
        units: list[Unit] = []
        rewards = [[rollout.reward for rollout in group if rollout.reward is not None] for group in groups]
        for group, found in zip(groups, rewards, strict=True):
            assert len(found) == self.plan.group_size, f"group of prompt {group[0].prompt.uid} is not fully scored"
        for group, advantages in zip(groups, self.plan.advantages(rewards), strict=True):
            how = {"by_sequence": self.plan.weigh_by_sequence, "constraint": self.plan.constraint}
            units += group_units(group, advantages, **how)
        packs = pack(units, pack_tokens=self.plan.pack_tokens)
        faults.point("controller.before_train")
        credited: Metrics = {}
        if self.plan.credit is not None:
            packs, credited = await self.plan.credit.assign(self.policy, packs)
        if self.plan.sleep:
            await self.generators.group.call("sleep", timeout_s=self.generators.timeout_s)
        trained = credited | await train_passes(self.policy, step, packs, self.loss, passes=self.plan.passes)
        row = self.ledger.commit(packs, draws=[group[0].prompt.uid for group in groups])
        self.ledger_file.append({"step": step, **row})
        assert self.ledger.balance() == len(self.buffer), (
            f"the ledger does not balance after step {step}: {self.ledger.state()}"
        )
        filled = fill(packs, pack_tokens=self.plan.pack_tokens)
        named = {name if "/" in name or name in ("loss", "lr") else f"policy/{name}": v for name, v in trained.items()}
        return _rollout_metrics(groups) | staleness | named | {"data/packs": len(packs), "data/fill": filled}

    def _staleness(self, step: int, groups: list[Group]) -> Metrics:
        """How many optimizer steps older than the policy the tokens' weights are."""
        ages = [step - version for group in groups for rollout in group for version in rollout.versions]
        if max(ages) > self.plan.max_staleness:
            old = [g[0].prompt.uid for g in groups for r in g if step - min(r.versions) > self.plan.max_staleness]
            raise StalenessError(
                f"step {step}: {len(old)} rollouts, the first of draw {old[0]}, have tokens {max(ages)} steps old, "
                f"rollout.max_staleness is {self.plan.max_staleness}; none is trained. A generator says that it holds "
                "weights which it does not sample with"
            )
        return {"rollout/staleness_mean": fmean(ages), "rollout/staleness_max": float(max(ages))}

    async def _sync(self, *, dead_only: bool = False) -> None:
        """Send the policy's weights to every generator and prove that they arrived.

        Args:
            dead_only: to those that are to be replaced.
        """
        if dead_only:
            self.buffer.wake()  # groups that wait for a generator in another's place have all their time again
        async with self._weights:
            await self.push.push(self.version, self._dtype, dead_only=dead_only)
            if not dead_only:
                self.synced = self.version

    async def _restore(self) -> int:
        found = await restore(self.policy, self.saver.checkpoints)
        self.ledger_file.restore(found.step if found else 0)
        if found is not None:
            self.ledger, self.version = Ledger(found.state["ledger"]), found.state["version"]
        self.observers.restore(found.state["history"] if found else [])
        self.buffer = GroupBuffer(
            self.ledger,
            prompts_per_step=self.plan.prompts_per_step,
            max_staleness=self.plan.max_staleness,
            num_steps=self.plan.num_steps,
            limits=self.maker.limits,
        )
        return found.step if found else 0

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
