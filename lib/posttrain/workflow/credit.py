"""Which token earned what: a completion's advantage becomes one a token, from what the policy's ranks say of them.

Between sampling and the optimizer step the ranks score the step's packs once, with the weights that the step starts
from: the critic's values, log p under the frozen reference, log p under a teacher. Out: the same packs, their samples'
advantages rewritten, with what the losses read of it. Plain numbers, so a resumed run makes the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from posttrain.data.gae import explained_variance, gae, rewards_to_go, whitened
from posttrain.data.types import Pack, Sample
from posttrain.model.losses.policy_gradient import kl_estimate
from posttrain.workflow.observers import Metrics
from posttrain.workflow.policy import Policy

_Known = dict[str, np.ndarray]
"""Of one sample's C trained tokens: [C] each, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """What stands on a token beside, or in place of, the advantage of its completion; the parts add up.

    Every logprob of the policy is the sampler's: it is what the tokens were drawn from, and the loss's ratio answers
    for its distance to the trainer.
    """

    temperature: float
    """Of sampling: all models are compared at it."""
    kl_coef: float = 0.0
    """Price of a nat of KL(policy || reference), paid at the token: with a critic a part of its reward; without,
    -kl_coef times the sum over this and all later tokens (REINFORCE++, arXiv:2501.03262), whose expectation is
    the gradient of the KL of whole completions for k1."""
    kl_estimator: str = "k1"
    teacher: bool = False
    """log p_teacher - log p of each token, whose mean over samples is -KL(policy || teacher): on-policy distillation
    (arXiv:2306.13649 with lambda = 1 and the reverse KL). Later tokens are not counted, as the teacher says at each
    what it thinks of it."""
    gae: tuple[float, float] | None = None
    """gamma and lambda; the completion's reward then comes with its last token, and the result is whitened."""

    @property
    def reads(self) -> list[str]:
        """What Policy.token_scores() is asked for."""
        wanted = {"values": self.gae is not None, "ref_logprobs": self.kl_coef > 0, "teacher": self.teacher}
        return [name for name, needed in wanted.items() if needed]

    async def assign(self, policy: Policy, packs: Sequence[Pack]) -> tuple[list[Pack], Metrics]:
        """The packs of a step with an advantage for every token, and policy/teacher_kl, value/explained_variance."""
        scores = await policy.token_scores(packs, self.reads, self.temperature)
        samples = [sample for pack in packs for sample in pack.samples]
        known = [_known(s, mine) for pack, of in zip(packs, scores, strict=True) for s, mine in _split(pack, of)]
        metrics: Metrics = {}
        if self.teacher:
            metrics["policy/teacher_kl"] = _mean([k["sampler"] - k["teacher"] for k in known], known)
        earned = [self._earned(each) for each in known]
        if self.gae is not None:
            returns = [each + k["values"] for each, k in zip(earned, known, strict=True)]
            explained = explained_variance(np.concatenate([k["values"] for k in known]), np.concatenate(returns))
            metrics |= {} if explained is None else {"value/explained_variance": explained}
            metrics["value/return"] = _mean(returns, known)
            known = [k | {"returns": r} for k, r in zip(known, returns, strict=True)]
            earned = whitened(earned)
        made = iter([_with(s, k | {"advantages": a}) for s, k, a in zip(samples, known, earned, strict=True)])
        return [replace(pack, samples=tuple(next(made) for _ in pack.samples)) for pack in packs], metrics

    def _earned(self, known: _Known) -> np.ndarray:
        """[C] advantage of each token of one completion."""
        total = known["advantages"]
        price = np.zeros(len(total))
        if self.kl_coef:
            now, then = (torch.from_numpy(known[name]) for name in ("sampler", "ref_logprobs"))
            price = self.kl_coef * kl_estimate(now, then, self.kl_estimator).numpy()
        if self.gae is None:
            total = total - rewards_to_go(price)
        else:
            gamma, lam = self.gae
            rewards = -price
            rewards[-1] += known["advantages"][-1]  # of a critic they are the completion's reward, on all its tokens
            total = gae(rewards, known["values"], gamma=gamma, lam=lam)
        return total + (known["teacher"] - known["sampler"]) if self.teacher else total


def _split(pack: Pack, scores: dict[str, np.ndarray]) -> list[tuple[Sample, dict[str, np.ndarray]]]:
    """Each sample with its part of the pack's [N] columns."""
    counts = [int(np.count_nonzero(sample.loss_mask)) for sample in pack.samples]
    parts = {name: np.split(column, np.cumsum(counts)[:-1]) for name, column in scores.items()}
    return [(sample, {name: parts[name][i] for name in parts}) for i, sample in enumerate(pack.samples)]


def _known(sample: Sample, scores: dict[str, np.ndarray]) -> _Known:
    """float64 of what is known of a sample's trained tokens."""
    columns = {"advantages": sample.advantages, "sampler": sample.sampler_logprobs, "weight": sample.loss_mask}
    trained, known = sample.loss_mask != 0, dict(scores)
    for name, column in columns.items():
        assert column is not None, f"credit is for rollouts, which have {name}"
        known[name] = column[trained]
    return {name: column.astype(np.float64) for name, column in known.items()}


def _with(sample: Sample, known: _Known) -> Sample:
    """The sample with what the losses read of its tokens, 0 where none is trained."""
    trained, columns = sample.loss_mask != 0, {}
    for name in ("advantages", "ref_logprobs", "values", "returns"):
        if name in known:
            columns[name] = np.zeros(len(sample), np.float32)
            columns[name][trained] = known[name]
    return replace(sample, **columns)


def _mean(columns: Sequence[np.ndarray], known: Sequence[_Known]) -> float:
    """Of all tokens, weighted as the loss weighs them."""
    weights = [each["weight"] for each in known]
    return float(np.average(np.concatenate(columns), weights=np.concatenate(weights)))
