"""A policy of one rank in this process, for tests that measure and need no actors."""

from posttrain.compute.mesh import Sizes
from posttrain.data.types import Pack
from posttrain.model.losses import Loss, count
from posttrain.workflow.policy_rank import PolicyRank
from steps.recipes import build_of, training_of


class OneRank:
    """A policy of one rank in this process."""

    def __init__(self, config, uri: str):
        self.pack_tokens = config.data.pack_tokens
        facts = {"backend": "posttrain", "training": training_of(config, config.method.name), "reference": False}
        build = build_of(config, None, trains=False)
        self.rank = PolicyRank(rank=0, sizes=Sizes(data=1), model_uri=uri, build=build, **facts)
        self.rank.address()
        self.rank.join("", 60.0)

    async def evaluate(self, packs: list[Pack], loss: Loss) -> dict[str, float]:
        return self.rank.evaluate(packs, loss, count(loss, packs))

    async def document_logprobs(self, packs: list[Pack]) -> list[list[float]]:
        return self.rank.document_logprobs(packs)
