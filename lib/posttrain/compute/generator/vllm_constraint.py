"""A Constraint as vLLM's logits processor: made by each worker of an engine, asked for each token of each request.

It works on logits before vLLM's temperature and softmax, so the `processed_logprobs` that vLLM reports are those of the
distribution over the allowed tokens. With a processor of one's own vLLM brings the tokens of a step that is still
under way before it asks (0.25 and later), so asynchronous scheduling is exact too.
"""

from functools import lru_cache
from typing import Any

KEY = "posttrain_constraint"
"""In the engine's additional_config: what load_constraint() takes."""


def engine_arguments(constraint: str) -> dict[str, Any]:
    """What vLLM's EngineArgs needs for a constraint, by its import path."""
    return {"logits_processors": [f"{__name__}:Allowed"], "additional_config": {KEY: constraint}}


def __getattr__(name: str) -> Any:
    """`Allowed`, for which vLLM must be imported: workers resolve it by this module's name."""
    if name != "Allowed":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _allowed()


@lru_cache(maxsize=1)
def _allowed() -> type:
    import torch
    from vllm.v1.sample.logits_processor import LogitsProcessor  # pyright: ignore[reportMissingImports]
    from vllm.v1.sample.logits_processor.builtin import process_dict_updates  # pyright: ignore[reportMissingImports]

    from posttrain.data.constraint import load_constraint, mask_logits

    class Allowed(LogitsProcessor):
        """-inf to all that the constraint does not allow."""

        def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool):
            self.constraint = load_constraint(vllm_config.additional_config[KEY], vllm_config.model_config.model)
            self.requests: dict[int, tuple[set[int], list[int], list[int]]] = {}
            """Row -> stop tokens, prompt, and the list that its output grows in."""

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            process_dict_updates(
                self.requests,
                batch_update,
                lambda params, prompt, output: (set(params.stop_token_ids or ()), prompt or [], output),
            )

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            for row, (stops, prompt, output) in self.requests.items():
                if not (output and output[-1] in stops):  # else it has ended, and leaves the batch with the next step
                    mask_logits(logits[row], self.constraint, prompt, output)
            return logits

    return Allowed
