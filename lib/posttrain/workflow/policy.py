"""The policy as the driver sees it: SPMD ranks behind one method a phase, whatever the mesh below."""

import time
from collections.abc import Sequence
from typing import Any

from posttrain.compute.mesh import Sizes
from posttrain.compute.pool import Pool
from posttrain.compute.weight_sync import Part
from posttrain.compute.workers import ActorGroup
from posttrain.data.pack import deal
from posttrain.data.types import Pack
from posttrain.model.losses import Loss, count
from posttrain.workflow.costs import Costs
from posttrain.workflow.policy_model import Build, Scores
from posttrain.workflow.policy_rank import PolicyRank
from posttrain.workflow.straggler import Stragglers, imbalance
from posttrain.workflow.training import Training


class Policy:
    """The driver's side of the ranks: one method a phase, whatever the mesh below."""

    def __init__(self, group: ActorGroup, costs: Costs, *, sizes: Sizes, pack_tokens: int, timeout_s: float):
        self.group, self.costs, self.sizes = group, costs, sizes
        self.pack_tokens, self.timeout_s = pack_tokens, timeout_s
        self.stragglers = Stragglers(group.hosts)
        self.notes: list[str] = []
        """What a person should know of the ranks, each once; who shows a note takes it away."""

    @staticmethod
    async def launch(
        *,
        sizes: Sizes,
        model_uri: str,
        backend: str,
        training: Training,
        reference: bool,
        timeout_s: float,
        pool: Pool,
        build: Build | None = None,
    ) -> "Policy":
        """Start the ranks, let them find each other, and load the model."""
        same = {"model_uri": model_uri, "backend": backend, "training": training, "reference": reference}
        same["build"] = build
        per_rank = [{"rank": r, "sizes": sizes, **same} for r in range(sizes.world)]
        group = ActorGroup("policy", PolicyRank, per_rank, pool)
        address = await group.call_one(0, "address", timeout_s=timeout_s)
        costs, *_ = await group.call("join", address, timeout_s, timeout_s=timeout_s)
        return Policy(group, costs, sizes=sizes, pack_tokens=training.pack_tokens, timeout_s=timeout_s)

    async def train_step(self, step: int, packs: Sequence[Pack], loss: Loss) -> dict[str, float]:
        """Deal the global batch to the ranks and take one optimizer step; metrics are means per loss token or unit.

        The times are those of rank 0, and "dispatch" is the rest until every rank has answered.
        """
        started = time.perf_counter()
        denominator, shares = count(loss, packs), self._shares(packs)
        calls = [((step, share, loss, denominator, repeats), {}) for share, repeats in shares]
        answers = await self.group.call_each("train_step", calls, timeout_s=self.timeout_s)
        metrics = answers[0] | self._balance(answers, [sum(map(self.costs.of, share)) for share, _ in shares])
        seconds = sum(metrics.get(f"time/{name}_s", 0.0) for name in ("forward", "backward", "reduce", "optimizer"))
        metrics |= self.costs.metrics(packs, seconds, ranks=len(shares), pack_tokens=self.pack_tokens)
        accounted = sum(value for name, value in metrics.items() if name.startswith("time/"))
        return metrics | {"time/dispatch_s": max(0.0, time.perf_counter() - started - accounted)}

    def _balance(self, answers: Sequence[dict[str, float]], work: Sequence[float]) -> dict[str, float]:
        """How even the step was, by FLOPs dealt and by seconds taken; notes a straggler."""
        if len(answers) == 1:
            return {}
        seconds = [a.get("time/forward_s", 0.0) + a.get("time/backward_s", 0.0) for a in answers]
        note = self.stragglers.seen(seconds, work)
        self.notes += [note] if note else []
        return {"data/imbalance": imbalance(work), "perf/imbalance": imbalance(seconds)}

    async def evaluate(self, packs: Sequence[Pack], loss: Loss) -> dict[str, float]:
        """Metrics of packs that are not trained on, under the current weights."""
        denominator = count(loss, packs)
        calls = [((share, loss, denominator, repeats), {}) for share, repeats in self._shares(packs)]
        metrics, *_ = await self.group.call_each("evaluate", calls, timeout_s=self.timeout_s)
        return metrics

    async def document_logprobs(self, packs: Sequence[Pack]) -> list[list[float]]:
        """Of each pack, in order, the log p of every sample's trained tokens under the current weights, nats."""
        return await self._of_packs("document_logprobs", packs)

    async def token_scores(self, packs: Sequence[Pack], names: Sequence[str], temperature: float) -> list[Scores]:
        """Of each pack, in order, what each of `names` says of its trained tokens, before a step.

        Args:
            names: of "values", the value head's; "ref_logprobs" and "teacher", log p of each token under the frozen
                reference and under the teacher, nats.
            temperature: of those logprobs.
        """
        return await self._of_packs("token_scores", packs, names, temperature)

    async def _of_packs(self, method: str, packs: Sequence[Pack], *args: Any) -> list[Any]:
        """What a method of the ranks finds of each pack, in the packs' order; each data rank takes a share."""
        ranks, rounds = self.sizes.data, -(-len(packs) // self.sizes.data)
        # Ranks of a sharded model go through as many packs each; what fills up a share is scored and not read.
        filled = [*packs, *[packs[0]] * (ranks * rounds - len(packs))] if self.costs.sharded else list(packs)
        calls = [((filled[self.sizes.data_rank(rank) :: ranks], *args), {}) for rank in range(self.sizes.world)]
        found = await self.group.call_each(method, calls, timeout_s=self.timeout_s)
        first = [next(r for r in range(self.sizes.world) if self.sizes.data_rank(r) == share) for share in range(ranks)]
        return [found[first[number % ranks]][number // ranks] for number in range(len(packs))]

    def start_weights(self, dtype: str, part: Part = "merged") -> Any:
        """Begin to gather the weights; a handle to rank 0's, to pass to the generators unread."""
        first, *_ = [self.group.start(rank, "weights", dtype, part) for rank in range(len(self.group))]
        return first

    async def weights_digest(self, dtype: str, part: Part = "merged") -> str:
        """digest() of the weights that start_weights() sends."""
        return (await self.group.call("weights_digest", dtype, part, timeout_s=self.timeout_s))[0]

    async def export(self, uri: str) -> str:
        """Publish the weights as a Hugging Face folder."""
        return (await self.group.call("export", uri, timeout_s=self.timeout_s))[0]

    def _shares(self, packs: Sequence[Pack]) -> list[tuple[list[Pack], int]]:
        """Of every rank its packs, and how many of the last count nothing: one that has a pack less than others gets
        the cheapest of all beside its own, as ranks of a sharded model go through a step together."""
        dealt = deal(packs, ranks=self.sizes.data, cost=self.costs.of)
        most, cheapest = max(map(len, dealt)), min(packs, key=self.costs.of)
        found = []
        for rank in range(self.sizes.world):
            share = dealt[self.sizes.data_rank(rank)]
            missing = most - len(share) if self.costs.sharded else 0
            found.append((share + [cheapest] * missing, missing))
        return found
