"""vLLM generators that fail or tell what they see, in processes of their own."""

import os
from pathlib import Path

from posttrain.compute.generator.vllm import VllmGenerator


class ForgetfulVllm(VllmGenerator):
    """Says that it took the weights of the second sync, and holds those of the first."""

    def _load(self, version, weights):
        if version != 1:
            super()._load(version, weights)


class NotingVllm(VllmGenerator):
    """Writes a line a sync into the file NOTED: how many tensors came, and their bytes."""

    def sync(self, version, weights):
        with Path(os.environ["NOTED"]).open("a") as file:
            file.write(f"{len(weights)} {sum(tensor.nbytes for tensor in weights.values())}\n")
        return super().sync(version, weights)
