"""What vLLM, the server of most models, says of given tokens: an oracle for our decoder, of which it shares no code."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import ComputeError

GPU_SHARE = 0.5
"""Of the GPU's memory, for vLLM's weights and cache; the rest is for what else holds some."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: no child outlives an error
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, where there is no GPU; its own choice is a share of the machine's memory
}
"""Read by vLLM when it is imported and when an engine starts."""


def require_vllm() -> None:
    """Say that vLLM is there, without the seconds of importing it.

    Raises:
        ComputeError: it is not.
    """
    if find_spec("vllm") is None:
        raise ComputeError("vllm is not installed. Fix: pip install 'posttrain[vllm]' on Linux, or leave vllm out")


def prompt_logprobs(
    folder: str | Path, documents: Sequence[Sequence[int]], *, dtype: torch.dtype, seed: int = 0
) -> list[list[float]]:
    """log p of every token of each document given those before it, nats, by vLLM in this process, without CUDA graphs.

    vLLM seeds this process's random generators.

    Args:
        documents: token ids, at least two each; the folder needs no tokenizer.
        dtype: of weights and activations.

    Returns:
        For a document of n tokens, n - 1 numbers: the first token has no prefix.

    Raises:
        ComputeError: vLLM is missing, cannot be imported, does not run the model, or left out a token.
    """
    require_vllm()
    with _environment(ENVIRONMENT):
        try:
            from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
            from vllm.distributed import cleanup_dist_env_and_memory  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ComputeError(f"vllm cannot be imported: {error}. Fix: install it for this machine's torch") from error
        engine = None
        try:
            engine = LLM(**_settings(folder, documents, dtype=dtype, seed=seed))
            sampling = SamplingParams(prompt_logprobs=0, max_tokens=1, detokenize=False)
            prompts = [{"prompt_token_ids": list(ids)} for ids in documents]
            outputs = engine.generate(prompts, sampling, use_tqdm=False)
        except Exception as error:  # vLLM raises many kinds for a model or a machine that it does not serve
            reason = " ".join(str(error).split())
            raise ComputeError(f"vllm cannot run {folder}: {type(error).__name__}: {reason}") from error
        finally:
            if engine is not None:
                engine.llm_engine.engine_core.shutdown()
                del engine
            cleanup_dist_env_and_memory()
            gc.collect()
    return [_of_tokens(ids, output.prompt_logprobs) for ids, output in zip(documents, outputs, strict=True)]


def _settings(
    folder: str | Path, documents: Sequence[Sequence[int]], *, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    return {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max(map(len, documents)) + 1,  # it samples one token
        "gpu_memory_utilization": GPU_SHARE,
        "enable_prefix_caching": False,  # a prefix that is cached has no logprobs
        "seed": seed,
    }


def _of_tokens(ids: Sequence[int], found: Sequence[Any] | None) -> list[float]:
    """Of a document's own tokens, from a mapping token -> logprob a position; the first position has none."""
    at = list(zip(ids, found or (), strict=False))[1:]
    if len(at) != len(ids) - 1 or any(token not in each for token, each in at):
        raise ComputeError(f"vllm left out logprobs of a document of {len(ids)} tokens. Fix: another version of vllm")
    return [each[token].logprob for token, each in at]


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """os.environ with these values, and as it was afterwards; what a person set stays."""
    before = {key: os.environ.get(key) for key in values}
    forced = {"VLLM_ENABLE_V1_MULTIPROCESSING"}
    os.environ.update({key: value for key, value in values.items() if key in forced or before[key] is None})
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
