"""The policy's adapters in vLLM: how they get into its own LoRA buffers, and how its model looks without those.

vLLM multiplies with an adapter beside the weight, so weights that stand still are loaded once and only adapters travel.
There is one adapter, in the only slot; each request asks for it. These names are vLLM's own and not promised by it:
what is held is read back after every sync (vllm_worker.py), so a version that does otherwise stops the run.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from posttrain.compute.weight_sync import adapter_part

NUMBER = 1
"""vLLM's id of the adapter."""


def engine_arguments(rank: int, targets: Sequence[str]) -> dict[str, Any]:
    """Of vLLM's EngineArgs, for adapters of `rank` on the modules that `targets` name."""
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks  # pyright: ignore[reportMissingImports]

    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": min(size for size in get_args(MaxLoRARanks) if size >= rank),
        "lora_target_modules": list(targets),
    }


def request() -> Any:
    """What a request says to be sampled with the adapter."""
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    return LoRARequest(lora_name="policy", lora_int_id=NUMBER, lora_path="in memory")


def take(manager: Any, tensors: Mapping[str, Tensor]) -> None:
    """Let vLLM's LoRAModelManager hold these adapters and no others; scaling is in B already."""
    from vllm.lora.lora_model import LoRAModel  # pyright: ignore[reportMissingImports]
    from vllm.lora.lora_weights import LoRALayerWeights  # pyright: ignore[reportMissingImports]

    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part = adapter_part(name)
        assert part is not None, f"{name} is of no adapter"
        found.setdefault(part[0], {})[part[1]] = tensor
    rank = max(each["A"].shape[0] for each in found.values())
    layers = {
        module: LoRALayerWeights(module, each["A"].shape[0], each["A"].shape[0], each["A"], each["B"])
        for module, each in found.items()
    }
    manager.remove_adapter(NUMBER)
    manager.add_adapter(LoRAModel(NUMBER, rank, layers))
    manager.activate_adapter(NUMBER)


def slots(module: Any, matrix: str) -> list[Tensor]:
    """Buffers of A [ranks, in] or B [out, ranks] in a module that vLLM wrapped, one for each that is fused in it."""
    stacked = module.lora_a_stacked if matrix == "A" else module.lora_b_stacked
    return [each[0, 0] for each in stacked]


@contextmanager
def bare(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Inside, the model is as it would be without adapters; the modules that wrap others for them, by name."""
    wrapped: dict[str, Any] = {
        name: module for name, module in model.named_modules() if hasattr(module, "lora_a_stacked")
    }
    for name, module in wrapped.items():
        model.set_submodule(name, module.base_layer)
    try:
        yield wrapped
    finally:
        for name, module in wrapped.items():
            model.set_submodule(name, module)
