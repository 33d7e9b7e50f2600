"""Models for vLLM's CPU backend: its attention wants heads of 32 and wider."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from posttrain import storage
from posttrain.compute.generator import Completion, Request
from posttrain.data.batch import collate
from posttrain.data.sample import shift
from posttrain.data.types import Pack
from posttrain.model.forward import forward
from posttrain.model.random_model import write_random_model

SHAPE = {
    "vocab_size": 300,  # not a multiple of 64: vLLM pads it
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}


def model_folder(folder: Path, **changes) -> Path:
    """A committed folder with a random model of SHAPE: `changes` overrides its config."""
    config = {"model_type": "qwen3", "tie_word_embeddings": True, **SHAPE, **changes}
    storage.ensure_folder(str(folder), lambda target: (write_random_model(target, config, seed=0), None)[1])
    return folder


def asked(*ids: int, seed: int = 0, temperature: float = 1.0, new: int = 12) -> Request:
    return Request(token_ids=ids, seed=seed, temperature=temperature, max_new_tokens=new)


@contextmanager
def told_of_step(engine, number: int = 1) -> Iterator[threading.Event]:
    """An event that is set once a VllmGenerator has made so many more steps."""
    reached, step, left = threading.Event(), engine.steps.step, iter(range(number - 1, -1, -1))

    def seen(version: int) -> None:
        step(version)
        if next(left, 0) == 0:
            reached.set()

    engine.steps.step = seen
    try:
        yield reached
    finally:
        del engine.steps.step


def our_logprobs(model, request: Request, made: Completion) -> torch.Tensor:
    """[tokens] nats: what our decoder says of a completion's tokens, at the request's temperature."""
    prompt = len(request.token_ids)
    ids = [*request.token_ids, *made.token_ids]
    one = shift(ids, [0.0] * prompt + [1.0] * len(made.token_ids))
    device = next(model.parameters()).device
    batch = collate(Pack(samples=(one,), num_units=1), pack_tokens=len(ids)).to(device)
    with torch.no_grad():
        return forward(model, batch, temperature=request.temperature or 1.0).logprobs
