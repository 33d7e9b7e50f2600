"""vLLM generators that fail, in processes of their own."""

from posttrain.compute.generator.vllm import VllmGenerator


class ForgetfulVllm(VllmGenerator):
    """Says that it took the weights of the second sync, and holds those of the first."""

    def _load(self, version, weights):
        if version != 1:
            super()._load(version, weights)
