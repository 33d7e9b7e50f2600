"""The embedded generator: transformers' own model class over synced weights, on CPU or one GPU.

Small on purpose: batched decoding with a KV cache and inverse-CDF sampling. It is an
independent implementation of the model, so its logprobs check the trainer's.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posttrain import storage
from posttrain.compute.generator import Completion, Request
from posttrain.compute.weight_sync import adapter_part, digest
from posttrain.data.constraint import Constraint, load_constraint, mask_logits
from posttrain.errors import SyncError

MAX_CACHE_TOKENS = 131_072
"""Tokens of KV cache held at once: 14 GiB for the Qwen3-0.6B shape in bfloat16 (28 layers x 2 x 1024 x 2 bytes)."""


class TransformersGenerator:
    """Sample from a Hugging Face model folder's architecture, in float32 on CPU or bfloat16 on a GPU."""

    max_adapter_rank: ClassVar[int] = 1 << 16
    """Any: an adapter's two matrices are multiplied with beside those of its Linear."""

    def __init__(
        self,
        *,
        model_uri: str,
        stop_ids: Sequence[int],
        pad_id: int,
        max_batch: int = 512,
        constraint: str | None = None,
    ):
        from transformers import AutoConfig, AutoModelForCausalLM

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        folder = storage.fetch(model_uri)
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        self.model = AutoModelForCausalLM.from_config(config, dtype=self.dtype).to(self.device).eval()
        self.stop_ids, self.pad_id, self.max_batch = tuple(stop_ids), pad_id, max_batch
        self.constraint = None if constraint is None else load_constraint(constraint, folder)
        self.version = -1
        self._adapters: dict[str, Tensor] = {}
        """By the names that they are sent under."""

    def weight_dtype(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @torch.no_grad()
    def sync(self, version: int, weights: Mapping[str, Tensor]) -> str:
        if self.version < 0 and all(map(adapter_part, weights)):
            raise SyncError("adapters came without the weights that they stand beside")
        self._make_room(weights)
        held = dict(self.model.named_parameters()) | self._adapters
        for name, tensor in weights.items():
            held[name].copy_(tensor)
        self.version = version
        return digest((name, held[name]) for name in weights)

    def _make_room(self, weights: Mapping[str, Tensor]) -> None:
        """Let modules read adapters that come for the first time."""
        for name in weights:
            if name in self._adapters or (part := adapter_part(name)) is None:
                continue
            self._adapters[name] = torch.empty(weights[name].shape, dtype=self.dtype, device=self.device)
            module, matrix = part
            if matrix == "A":
                names = name, f"{name.removesuffix('A.weight')}B.weight"
                self.model.get_submodule(module).register_forward_hook(partial(_adapted, self._adapters, *names))

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        assert self.version >= 0, "generate() before the first sync(): the generator holds no weights"
        done: dict[int, Completion] = {}
        for chosen in self._batches(requests):
            done |= dict(zip(chosen, self._decode([requests[i] for i in chosen]), strict=True))
        return [done[i] for i in range(len(requests))]

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Indices of requests to decode together: like lengths, within max_batch rows and MAX_CACHE_TOKENS."""
        size = [len(r.token_ids) + r.max_new_tokens for r in requests]
        batch: list[int] = []
        for index in sorted(range(len(requests)), key=lambda i: (size[i], i)):
            if batch and (len(batch) == self.max_batch or (len(batch) + 1) * size[index] > MAX_CACHE_TOKENS):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    @torch.no_grad()
    def _decode(self, requests: Sequence[Request]) -> list[Completion]:
        longest, steps = max(len(r.token_ids) for r in requests), max(r.max_new_tokens for r in requests)
        rows = [[self.pad_id] * (longest - len(r.token_ids)) + list(r.token_ids) for r in requests]
        ids = torch.tensor(rows, device=self.device)
        lengths = torch.tensor([len(r.token_ids) for r in requests], device=self.device)
        mask = (torch.arange(longest, device=self.device)[None] >= longest - lengths[:, None]).long()
        noise = torch.from_numpy(np.stack([uniforms(r.seed, steps) for r in requests]))
        temperature = torch.tensor([r.temperature for r in requests], device=self.device)
        limit = torch.tensor([r.max_new_tokens for r in requests], device=self.device)
        stops = torch.tensor(self.stop_ids, device=self.device)
        tokens: list[Tensor] = []
        logprobs: list[Tensor] = []
        cache, positions = None, (mask.cumsum(-1) - 1).clamp(min=0)
        finished = torch.zeros(len(requests), dtype=torch.bool, device=self.device)
        for step in range(steps):
            out = self.model(
                ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            logits = out.logits[:, -1].float()
            if self.constraint is not None:
                _mask(logits, self.constraint, requests, tokens, finished)
            token, logprob = sample(logits, noise[:, step].to(self.device), temperature)
            tokens.append(torch.where(finished, self.pad_id, token))
            logprobs.append(logprob)
            finished = finished | torch.isin(token, stops) | (limit <= step + 1)
            if bool(finished.all()):
                break
            ids, positions = token[:, None], (lengths + step)[:, None]
            mask = torch.cat((mask, mask.new_ones(len(requests), 1)), dim=1)
        return self._completions(requests, torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist())

    def _completions(
        self, requests: Sequence[Request], tokens: list[list[int]], logprobs: list[list[float]]
    ) -> list[Completion]:
        completions = []
        for request, row, scores in zip(requests, tokens, logprobs, strict=True):
            row = row[: request.max_new_tokens]
            end = next((place for place, token in enumerate(row) if token in self.stop_ids), None)
            length = len(row) if end is None else end + 1
            completions.append(
                Completion(
                    token_ids=tuple(row[:length]),
                    logprobs=tuple(scores[:length]),
                    versions=(self.version,) * length,
                    finish_reason="length" if end is None else "stop",
                )
            )
        return completions


def _adapted(adapters: Mapping[str, Tensor], a: str, b: str, _: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """What a Linear with an adapter computes: W x + B A x."""
    return output + F.linear(F.linear(inputs[0], adapters[a]), adapters[b])


def _mask(
    logits: Tensor, constraint: Constraint, requests: Sequence[Request], tokens: Sequence[Tensor], finished: Tensor
) -> None:
    """Leave of each row of logits [B, V] that goes on what the constraint allows, the others at -inf."""
    written = torch.stack(list(tokens), 1).tolist() if tokens else [[]] * len(requests)
    for row, ended in enumerate(finished.tolist()):
        if not ended:
            mask_logits(logits[row], constraint, requests[row].token_ids, written[row])


def uniforms(seed: int, count: int) -> np.ndarray:
    """[count] float64 in [0, 1): the noise of one request, a pure function of its seed (Philox)."""
    return np.random.Generator(np.random.Philox(seed)).random(count)


def sample(logits: Tensor, noise: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row by inverse CDF, and its logprob.

    Args:
        logits: [B, V] float32.
        noise: [B] float64 in [0, 1), one uniform draw per row.
        temperature: [B]; 0 takes the argmax and reports its logprob at temperature 1.

    Returns:
        tokens [B] int64 and logprobs [B] float32, nats.
    """
    greedy = temperature == 0
    scaled = logits / torch.where(greedy, 1.0, temperature)[:, None]
    log_p = scaled - scaled.logsumexp(-1, keepdim=True)
    cdf = log_p.double().exp().cumsum(-1)
    drawn = (
        torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    )
    token = torch.where(greedy, scaled.argmax(-1), drawn)
    return token, log_p.gather(-1, token[:, None]).squeeze(-1)
