"""Steps of vLLM's engine, with each step's tokens and logprobs taken from the runner's arrays at once.

vLLM's own way makes some objects for every token of every request, to stream it. Nobody streams here: a completion is
wanted when it is whole. On a GPU that work is what a step of a small model waits for.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import gcd
from typing import Any

from posttrain.compute.generator import Completion
from posttrain.compute.generator.vllm_requests import completion


@dataclass(slots=True, kw_only=True)
class Running:
    """A request that is not finished."""

    request: Any
    """vLLM's scheduler's own; its tokens are those that were accepted."""
    sampled: list[int] = field(default_factory=list)
    """The tokens that `logprobs` are of."""
    logprobs: list[float] = field(default_factory=list)
    marks: list[tuple[int | None, int]] = field(default_factory=list)
    """(tokens, version): up to so many tokens are of that version; appended by a sync."""
    done: "Future[Completion]" = field(default_factory=Future)


class Steps:
    """The requests of an LLMEngine in this process, and its steps."""

    def __init__(self, engine: Any):
        self.engine = engine
        self.running: dict[str, Running] = {}
        self._numbered = 0
        scheduler = engine.engine_core.engine_core.scheduler
        self._requests: Mapping[str, Any] = scheduler.requests
        self._accept = scheduler.update_from_output
        scheduler.update_from_output = self._recorded
        skip_filled_blocks(scheduler)

    def add(self, prompt: dict[str, Any], sampling: Any, adapter: Any) -> "Future[Completion]":
        """Have a request sampled in the coming steps."""
        self._numbered += 1
        name = self.engine.add_request(str(self._numbered), prompt, sampling, lora_request=adapter)
        self.running[name] = Running(request=self._requests[name])
        return self.running[name].done

    def mark(self, version: int) -> None:
        """What is sampled so far is of that version."""
        for each in self.running.values():
            each.marks.append((len(each.logprobs), version))

    def step(self, version: int) -> None:
        """One step of the engine, which holds weights of `version`; completions that end are done."""
        found = [output for output in self.engine.engine_core.get_output().outputs if output.finish_reason is not None]
        self.engine.output_processor.process_outputs(found)  # it forgets them
        for output in found:
            ended = self.running.pop(output.request_id)
            try:
                made = completion(
                    reason=str(output.finish_reason),
                    tokens=ended.request.output_token_ids,
                    sampled=ended.sampled,
                    logprobs=ended.logprobs,
                    marks=[*ended.marks, (None, version)],
                )
            except Exception as error:  # it is the caller's
                ended.done.set_exception(error)
            else:
                ended.done.set_result(made)

    def fail(self, error: Exception) -> None:
        """End every request with an error."""
        for each in self.running.values():
            each.done.set_exception(error)
        self.running.clear()

    def _recorded(self, scheduled: Any, output: Any) -> Any:
        """The scheduler's update_from_output(), which sees no logprobs; those of tokens that it accepts are kept."""
        found, output.logprobs = output.logprobs, None
        accepted = self._accept(scheduled, output)
        if found is not None:
            tokens, logprobs = found.logprob_token_ids[:, 0].tolist(), found.logprobs[:, 0].tolist()
            rows = found.cu_num_generated_tokens or range(len(tokens))
            for name, row in zip(output.req_ids, rows, strict=False):
                each = self.running.get(name)
                if each is not None and each.request.num_output_tokens > len(each.logprobs):
                    each.sampled.append(tokens[row])
                    each.logprobs.append(logprobs[row])
        return accepted


def skip_filled_blocks(scheduler: Any) -> None:
    """Have a scheduler look for room in the cache only where a request's next token begins a new block.

    Inside a block, of 16 tokens by default, that search ends with the answer that is given here, after a fourth of the
    scheduler's time. What it does beside, handing out blocks that full ones are found by and taking back those that a
    window has left behind, comes with the next block.
    """
    manager = scheduler.kv_cache_manager
    tokens = gcd(*(group.kv_cache_spec.block_size for group in scheduler.kv_cache_config.kv_cache_groups))
    search = manager.allocate_slots

    def allocate_slots(request: Any, num_new_tokens: int, *, num_lookahead_tokens: int = 0, **more: Any) -> Any:
        inside = num_new_tokens == 1 and request.num_computed_tokens % tokens != 0
        if inside and not num_lookahead_tokens and not more:
            return manager.empty_kv_cache_blocks
        return search(request, num_new_tokens, num_lookahead_tokens=num_lookahead_tokens, **more)

    manager.allocate_slots = allocate_slots
