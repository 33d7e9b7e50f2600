"""Looks at every step's metrics for what goes wrong without an error: a loss that jumps, a policy that collapses.

A rule holds once it has held IN_A_ROW steps in a row; it is then told once, on the card and in the log, and again only
after it has not held for WINDOW steps. Steps at which one holds are counted (`watch/steps`). It warns and does not
stop: what is certain to be wrong (a loss, gradient or KL that is no number) the engine refuses before the weights
change, and what else is too much for a run only its owner knows.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

IN_A_ROW = 3
WINDOW = 50
"""Steps looked back on."""
ENOUGH = 20
"""Steps from which on their spread is known."""
FIRST = 10
"""Steps whose median is what a run began with."""
SPREADS = 10.0
"""Of a jump: that of a normal distribution's values beyond is 1e-23, that of one with tails like exp(-x) 1e-3."""
SIGMA = 1.4826
"""Standard deviations in a median absolute deviation, of a normal distribution."""
JUMP = 0.5
"""Of the median's size: a curve as smooth as a line has no spread, and may still rise by a little."""
COLLAPSED = 0.05
"""Of the entropy that a policy began with."""
FAR_NATS = 2.0
"""A KL per token at which the reference gives the policy's tokens a seventh of the policy's probability, on average."""
APART_NATS = 0.1
"""A KL per token of trainer and sampler; that of bfloat16 beside bfloat16 is 1e-5 (benchmarks/grpo_vllm.py)."""

JUMPS = {"loss": "the loss", "grad_norm": "the gradient's norm", "policy/grad_norm": "the gradient's norm"}
CEILINGS = {
    "policy/kl": (
        FAR_NATS,
        "the policy is far from its reference. Fix: a higher method.kl_coef or a lower optim.lr, and look whether the "
        "rollouts on the card game the reward",
    ),
    "policy/mismatch_kl": (
        APART_NATS,
        "the sampler's probabilities are not those of the trainer. Fix: a lower rollout.max_staleness, or report it "
        "where that is 0",
    ),
}

ENTROPY = "policy/entropy"
WATCHED = {*JUMPS, *CEILINGS, ENTROPY}


@dataclass
class Rule:
    """What is known of one metric: its last values, and for how many steps its rule has held or not."""

    first: list[float] = field(default_factory=list)
    last: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    held: int = 0
    quiet: int = WINDOW
    """Steps since it was told and did not hold."""


class Watch:
    """One for a run; what it is after a resume is a function of the steps before."""

    def __init__(self, history: Sequence[Mapping[str, float]] = ()):
        """
        Args:
            history: the steps of earlier attempts, which were told of then.
        """
        self.rules: dict[str, Rule] = {}
        self.notes: list[str] = []
        """What a person should know, each once; who shows a note takes it away."""
        self.steps = 0
        """At which a rule held."""
        for step in history:
            self.seen(step)
        self.notes.clear()

    def seen(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Look at a finished step; watch/steps, once there are any.

        Args:
            metrics: with the step's number under "step".
        """
        held = False
        for name in WATCHED & metrics.keys():
            rule, value = self.rules.setdefault(name, Rule()), metrics[name]
            held |= self._holds(rule, _wrong(name, value, rule), int(metrics["step"]) + 1)
            rule.last.append(value)
            if len(rule.first) < FIRST:
                rule.first.append(value)
        self.steps += held
        return {"watch/steps": float(self.steps)} if self.steps else {}

    def _holds(self, rule: Rule, why: str, step: int) -> bool:
        if not why:
            rule.held, rule.quiet = 0, rule.quiet + 1
            return False
        rule.held += 1
        if rule.held < IN_A_ROW:
            return False
        if rule.quiet >= WINDOW:
            self.notes.append(f"WARNING: step {step} and the {IN_A_ROW - 1} before it: {why}")
        rule.quiet = 0
        return True


def _wrong(name: str, value: float, rule: Rule) -> str:
    """What is wrong with a value, in words; empty if nothing is."""
    if name in JUMPS:
        return _jump(JUMPS[name], value, rule.last)
    if name in CEILINGS:
        most, what = CEILINGS[name]
        return f"{name} is {value:.3g} nats per token, above {most:g}: {what}" if value > most else ""
    began = median(rule.first) if len(rule.first) == FIRST else 0.0
    if value >= COLLAPSED * began:
        return ""
    return (
        f"the policy's entropy is {value:.3g} nats per token, of {began:.3g} at first: its answers to a prompt are "
        "nearly the same, and where their rewards are equal nothing is learned. Right if the reward is as good as it "
        "gets; else a lower optim.lr, or a higher rollout.temperature or method.kl_coef"
    )


def _jump(what: str, value: float, last: Sequence[float]) -> str:
    if len(last) < ENOUGH:
        return ""
    usual = median(last)
    spread = SIGMA * median(abs(each - usual) for each in last)
    if value <= usual + max(SPREADS * spread, JUMP * abs(usual)):
        return ""
    return (
        f"{what} is {value:.3g}, where {usual:.3g} with a spread of {spread:.2g} was usual in the {len(last)} steps "
        "before. Fix, if it does not come down: resume an earlier checkpoint with a lower optim.lr or "
        "optim.max_grad_norm, and look at the rows of these steps"
    )
