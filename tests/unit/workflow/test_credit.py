"""What stands on each token, from scores of a policy in this process, against plain loops and exact expectations."""

import asyncio
from itertools import product

import numpy as np
import pytest
import torch

from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.data.types import Pack
from posttrain.workflow.credit import Credit

LENGTHS = (4, 1, 3)
PROMPT = 2


class Scoring:
    """A policy whose ranks say what the test knows, in the packs' order."""

    def __init__(self, **columns: list[list[float]]):
        self.columns, self.asked = columns, []

    async def token_scores(self, packs: list[Pack], names: list[str], temperature: float):
        self.asked.append((tuple(names), temperature))
        by_length = {len(column): number for number, column in enumerate(self.columns[names[0]])}
        found = []
        for each in packs:
            order = [by_length[int(np.count_nonzero(sample.loss_mask))] for sample in each.samples]
            found.append(
                {name: np.concatenate([self.columns[name][i] for i in order]).astype(np.float32) for name in names}
            )
        return found


def rollouts(advantages: list[float], sampler: list[list[float]], *, weight: float = 1.0) -> list[Pack]:
    """A completion of each of LENGTHS after two tokens of prompt, in two packs."""
    units = []
    for length, advantage, logprobs in zip(LENGTHS, advantages, sampler, strict=True):
        silent = [0.0] * PROMPT
        columns = {"sampler_logprobs": silent + logprobs, "advantages": silent + [advantage] * length}
        units.append((shift([5] * (PROMPT + length), silent + [weight] * length, **columns),))
    found = pack(units, pack_tokens=8)
    assert len(found) == 2
    return found


def numbers(seed: int) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=n).tolist() for n in LENGTHS]


def by_length(packs: list[Pack], name: str) -> list[list[float]]:
    """[completion][token], off the prompt, in the order of LENGTHS."""
    found = {}
    for sample in (sample for each in packs for sample in each.samples):
        column = getattr(sample, name)
        assert (column[sample.loss_mask == 0] == 0).all()
        found[int(np.count_nonzero(sample.loss_mask))] = column[sample.loss_mask != 0].tolist()
    return [found[length] for length in LENGTHS]


def assigned(credit: Credit, policy: Scoring, packs: list[Pack]):
    return asyncio.run(credit.assign(policy, packs))  # pyright: ignore[reportArgumentType]


def test_a_teacher_gives_each_token_its_logprob_less_the_policys_and_reports_the_kl():
    sampler, teacher = numbers(0), numbers(1)
    policy = Scoring(teacher=teacher)
    packs, metrics = assigned(Credit(temperature=0.7, teacher=True), policy, rollouts([0, 0, 0], sampler))
    assert policy.asked == [(("teacher",), 0.7)], "one question, at the temperature of sampling"
    for found, theirs, ours in zip(by_length(packs, "advantages"), teacher, sampler, strict=True):
        assert found == pytest.approx([t - s for t, s in zip(theirs, ours, strict=True)], abs=1e-6)
    gaps = [s - t for ours, theirs in zip(sampler, teacher, strict=True) for s, t in zip(ours, theirs, strict=True)]
    assert metrics == {"policy/teacher_kl": pytest.approx(sum(gaps) / len(gaps), abs=1e-6)}


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_price_of_kl_is_paid_by_all_tokens_up_to_it(estimator):
    sampler, reference = numbers(0), numbers(2)
    credit = Credit(temperature=1.0, kl_coef=0.3, kl_estimator=estimator)
    packs, metrics = assigned(credit, Scoring(ref_logprobs=reference), rollouts([1.0, -1.0, 0.5], sampler))
    price = {"k1": lambda g: g, "k2": lambda g: g * g / 2, "k3": lambda g: np.exp(-g) - 1 + g}[estimator]
    for found, advantage, ours, theirs in zip(
        by_length(packs, "advantages"), (1.0, -1.0, 0.5), sampler, reference, strict=True
    ):
        paid = [0.3 * price(s - r) for s, r in zip(ours, theirs, strict=True)]
        assert found == pytest.approx([advantage - sum(paid[t:]) for t in range(len(paid))], abs=1e-5)
    assert by_length(packs, "ref_logprobs") == [pytest.approx(row) for row in reference], "for the metric of the loss"
    assert metrics == {}


def test_a_critic_spreads_the_reward_and_the_price_by_gae():
    sampler, reference, values = numbers(0), numbers(2), numbers(3)
    rewards, (gamma, lam) = (1.0, 0.0, 0.25), (0.9, 0.8)
    credit = Credit(temperature=1.0, kl_coef=0.1, gae=(gamma, lam))
    policy = Scoring(values=values, ref_logprobs=reference)
    packs, metrics = assigned(credit, policy, rollouts(list(rewards), sampler))
    expected = []
    for reward, ours, theirs, v in zip(rewards, sampler, reference, values, strict=True):
        r = [-0.1 * (s - q) for s, q in zip(ours, theirs, strict=True)]
        r[-1] += reward
        after = [*v[1:], 0.0]
        errors = [r[t] + gamma * after[t] - v[t] for t in range(len(v))]
        expected.append([sum((gamma * lam) ** k * e for k, e in enumerate(errors[t:])) for t in range(len(v))])
    returns = [[a + x for a, x in zip(row, v, strict=True)] for row, v in zip(expected, values, strict=True)]
    for found, wanted in zip(by_length(packs, "returns"), returns, strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)
    flat = np.concatenate(expected)
    for found, wanted in zip(by_length(packs, "advantages"), expected, strict=True):
        assert found == pytest.approx(((np.array(wanted) - flat.mean()) / flat.std()).tolist(), abs=1e-4)
    spread = np.concatenate(returns)
    assert metrics["value/explained_variance"] == pytest.approx(1 - flat.var() / spread.var(), abs=1e-5)
    assert metrics["value/return"] == pytest.approx(spread.mean(), abs=1e-5)
    assert by_length(packs, "values") == [pytest.approx(row) for row in values]


def test_means_are_weighted_as_the_loss_weighs():
    sampler, teacher = [[0.0] * n for n in LENGTHS], [[-1.0] * n for n in LENGTHS]
    packs = rollouts([0, 0, 0], sampler, weight=0.125)
    assert assigned(Credit(temperature=1.0, teacher=True), Scoring(teacher=teacher), packs)[1] == {
        "policy/teacher_kl": 1.0
    }


def test_the_expected_gradient_of_a_k1_price_is_that_of_the_kl_of_whole_completions():
    """All completions of two tokens over a vocabulary of three, so the expectation is a sum and has no noise."""
    generator = torch.manual_seed(0)
    first, second = torch.randn(3, generator=generator), torch.randn(3, 3, generator=generator)
    ref_first, ref_second = torch.randn(3, generator=generator), torch.randn(3, 3, generator=generator)
    leaves = [first.double().requires_grad_(), second.double().requires_grad_()]
    p = [torch.log_softmax(leaf, -1) for leaf in leaves]
    q = [torch.log_softmax(each.double(), -1) for each in (ref_first, ref_second)]
    joint = (p[0][:, None] + p[1]).flatten()
    kl = (joint.exp() * (joint - (q[0][:, None] + q[1]).flatten())).sum()
    wanted = torch.autograd.grad(kl, leaves, retain_graph=True)

    surrogate = torch.zeros((), dtype=torch.float64)
    for a, b in product(range(3), range(3)):
        chosen = torch.stack([p[0][a], p[1][a, b]])
        ours, theirs = chosen.detach().tolist(), [q[0][a].item(), q[1][a, b].item()]
        silent = [0.0] * PROMPT
        columns = {"sampler_logprobs": silent + ours, "advantages": [0.0] * 4}
        packs = pack([(shift([5, 5, a, b], [*silent, 1.0, 1.0], **columns),)], pack_tokens=8)
        (made,), _ = assigned(Credit(temperature=1.0, kl_coef=1.0), Scoring(ref_logprobs=[theirs]), packs)
        advantages = torch.from_numpy(made.samples[0].advantages[-2:].astype(np.float64))
        surrogate = surrogate - chosen.sum().detach().exp() * (advantages * chosen).sum()
    found = torch.autograd.grad(surrogate, leaves)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
