"""An engine of your own that samples for the policy: one completion after the other, nothing cached, exact.

Named in config.yaml as my_generator:PlainGenerator. What makes it a generator are three methods: it takes the policy's
weights and answers with a digest of what it then holds, and it turns token ids into token ids with their logprobs.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain import storage
from posttrain.compute.generator import Completion, Request
from posttrain.compute.weight_sync import digest


class PlainGenerator:
    """Made in a process of its own, as cls(model_uri=…, stop_ids=…, pad_id=…)."""

    def __init__(self, *, model_uri: str, stop_ids, pad_id: int):
        config = AutoConfig.from_pretrained(str(storage.fetch(model_uri)), local_files_only=True)
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self.stop_ids, self.version = set(stop_ids), -1

    def weight_dtype(self) -> str:
        """What sync() wants to be sent."""
        return "float32"

    @torch.no_grad()
    def sync(self, version: int, weights) -> str:
        """Hold new weights; the digest is compared with the policy's, so that no stale weight goes unseen."""
        held = dict(self.model.named_parameters())
        for name, tensor in weights.items():
            held[name].copy_(tensor)
        self.version = version
        return digest((name, held[name]) for name in weights)

    def generate(self, requests: list[Request]) -> list[Completion]:
        """The seed of a request alone decides its noise, so that a resumed run samples the same tokens."""
        return [self._one(request) for request in requests]

    @torch.no_grad()
    def _one(self, request: Request) -> Completion:
        noise = torch.Generator().manual_seed(request.seed % 2**63)
        ids, logprobs = list(request.token_ids), []
        for _ in range(request.max_new_tokens):
            logits = self.model(torch.tensor([ids])).logits[0, -1].float() / (request.temperature or 1.0)
            log_p = logits.log_softmax(-1)
            greedy = request.temperature == 0
            token = int(log_p.argmax() if greedy else torch.multinomial(log_p.exp(), 1, generator=noise))
            ids.append(token)
            logprobs.append(float(log_p[token]))  # of the distribution that was sampled, temperature included
            if token in self.stop_ids:
                break
        made = tuple(ids[len(request.token_ids) :])
        ended = "stop" if made[-1] in self.stop_ids else "length"
        versions = (self.version,) * len(made)
        return Completion(token_ids=made, logprobs=tuple(logprobs), versions=versions, finish_reason=ended)
