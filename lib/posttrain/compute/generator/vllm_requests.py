"""Our requests and completions in vLLM's words: one request is one sample with a seed of its own."""

from collections.abc import Sequence
from typing import Any

from posttrain.compute.generator import Completion, Request
from posttrain.errors import ComputeError, ConfigError, DataError

MIN_TEMPERATURE = 0.01
"""vLLM raises a lower one to this, silently: logprobs would be of another distribution than the policy's."""


def sampling_params(request: Request, *, stop_ids: Sequence[int], room: int) -> Any:
    """vLLM's SamplingParams: the whole distribution at one temperature, as the loss scores it; no top_p, no top_k.

    Args:
        room: tokens that the engine holds of one request.

    Raises:
        ConfigError, DataError: vLLM would sample something else than was asked for, or nothing.
    """
    from vllm import SamplingParams  # pyright: ignore
    from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

    if 0 < request.temperature < MIN_TEMPERATURE:
        raise ConfigError(f"temperature {request.temperature}: vllm samples at 0 or at {MIN_TEMPERATURE} and above")
    if len(request.token_ids) >= room:
        raise DataError(f"a prompt of {len(request.token_ids)} tokens leaves no room in the {room} of the engine")
    return SamplingParams(
        temperature=request.temperature,
        seed=request.seed % (1 << 63),
        max_tokens=request.max_new_tokens,
        stop_token_ids=list(stop_ids),
        ignore_eos=True,  # the config's own stop token counts only if it is one of ours
        logprobs=0,  # of the sampled token alone
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def completion(
    *,
    reason: str,
    tokens: Sequence[int],
    sampled: Sequence[int],
    logprobs: Sequence[float],
    marks: Sequence[tuple[int | None, int]],
) -> Completion:
    """A Completion of what vLLM says of a request that ended.

    Args:
        sampled: tokens that `logprobs` are of.
        marks: (tokens, version) in order: up to so many tokens are of that version; None is up to the last.

    Raises:
        ComputeError: vLLM gave the request up, or logprobs of other tokens than it sampled.
    """
    if reason not in ("stop", "length"):
        raise ComputeError(f"vllm ended a request for {reason}")
    tokens = tuple(tokens)
    if tuple(sampled) != tokens:
        raise ComputeError(f"vllm gave {len(sampled)} logprobs for {len(tokens)} tokens, or of other tokens")
    versions: list[int] = []
    for count, version in marks:
        versions += [version] * ((len(tokens) if count is None else count) - len(versions))
    return Completion(token_ids=tokens, logprobs=tuple(logprobs), versions=tuple(versions), finish_reason=reason)
