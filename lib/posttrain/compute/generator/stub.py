"""A generator without a model: what a run costs beside sampling, and tests of the loop in which nothing is learned.

Answers are tokens of the prompt in an order that the seed decides, so they are in any vocabulary.
"""

import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from posttrain.compute.generator import Completion, Request
from posttrain.compute.weight_sync import digest


class StubGenerator:
    """Answers at once, or after `seconds` a call; takes any number of calls at the same time.

    Its logprobs are made up, so what is trained on them means nothing.
    """

    def __init__(self, *, model_uri: str, stop_ids: Sequence[int], pad_id: int, seconds: float = 0.0):
        self.stop_ids, self.seconds, self.version = tuple(stop_ids), seconds, -1

    def weight_dtype(self) -> str:
        return "float32"

    def sync(self, version: int, weights: Mapping[str, Tensor]) -> str:
        self.version = version
        return digest(weights.items())

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        assert self.version >= 0, "generate() before the first sync()"
        if self.seconds:
            time.sleep(self.seconds)
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Completion:
        prompt, seed = request.token_ids, request.seed
        length = 1 + seed % request.max_new_tokens
        token_ids = [prompt[(seed >> (place % 48)) % len(prompt)] for place in range(length - 1)]
        return Completion(
            token_ids=(*token_ids, self.stop_ids[0]),
            logprobs=(-1.0,) * length,
            versions=(self.version,) * length,
            finish_reason="stop",
        )
