"""Adapters as a PEFT folder: adapter_config.json and adapter_model.safetensors, which PEFT, vLLM and this library open.

A folder is read only where it means what model/lora.py computes: a config that asks for more is refused, and so is
one whose tensors are not exactly those that it announces. Pickled weights are not opened.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from posttrain.errors import ModelError
from posttrain.model.collectives import fill, full
from posttrain.model.lora import (
    ALL_LINEAR,
    LoRA,
    adapters,
    add_lora,
    linears,
    select,
    shortest_targets,
)
from posttrain.model.tensor_file import TensorFile

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

PREFIX = "base_model.model."
"""Before the Hugging Face name of the module: PEFT's wrapper inside its wrapper."""

SUFFIXES = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
"""Our parameter of an Adapter -> the end of PEFT's tensor name."""

READ = ("peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "use_dora")
"""Keys of adapter_config.json that are followed."""

WITHOUT_EFFECT = (
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "lora_dropout", "peft_version"),
    *("auto_mapping", "megatron_core", "layers_pattern", "eva_config", "qalora_group_size"),
)
"""Keys that do not change what a trained adapter computes, whatever they say."""

PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base weights as they are; PiSSA and its kin subtract from them."""

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def adapter_tensors(model: nn.Module, *, hf_names: Callable[[str], str]) -> dict[str, Tensor]:
    """The adapters' tensors under PEFT's names, detached, whole, on their device, in their dtype.

    Args:
        hf_names: our name of a Linear's weight -> the Hugging Face name of it.
    """
    tensors = {}
    for name, _, adapter in adapters(model):
        for part, parameter in adapter.named_parameters():
            tensors[_peft_name(hf_names, name, part)] = full(parameter.detach())
    return tensors


def scaled_tensors(model: nn.Module, *, hf_names: Callable[[str], str]) -> Iterator[tuple[str, Tensor]]:
    """As adapter_tensors(), one at a time, with the scaling in lora_B (in float32): who adds B A x needs no more.

    DoRA, which is more than that, has no such tensors.
    """
    for name, _, adapter in adapters(model):
        assert adapter.magnitude is None, "DoRA is not a sum"
        yield _peft_name(hf_names, name, "a"), full(adapter.a.detach())
        yield _peft_name(hf_names, name, "b"), full(adapter.b.detach()).float() * adapter.scaling


def save_adapter(
    model: nn.Module, folder: str | Path, *, lora: LoRA, base: str, hf_names: Callable[[str], str]
) -> None:
    """Write the adapters of `model` as PEFT would.

    Args:
        lora: what they were made from.
        base: the model they belong to, a path or a name on the Hub.
        hf_names: our name of a Linear's weight -> the Hugging Face name of it.

    Raises:
        ModelError: the model has no adapters, or they are not what `lora` says.
    """
    adapted = list(adapters(model))
    if not adapted:
        raise ModelError(f"{folder}: the model has no adapters to save; add_lora() first")
    for name, _, adapter in adapted:
        has = (adapter.a.shape[0], adapter.scaling, adapter.magnitude is not None)
        if has != (lora.rank, lora.scaling, lora.dora):
            wanted = (lora.rank, lora.scaling, lora.dora)
            raise ModelError(
                f"{folder}: the adapter of {name} has rank, scaling, DoRA {has}, not {wanted}; "
                "pass the LoRA that add_lora() was given"
            )
    names = {name: _module_name(hf_names, name) for name, _ in linears(model)}
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,  # readers expect an int
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": list(shortest_targets([names[name] for name, *_ in adapted], names.values())),
        "task_type": "CAUSAL_LM",
        "use_dora": lora.dora,
        "use_rslora": lora.rslora,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter_tensors(model, hf_names=hf_names).items()}
    save_file(tensors, Path(folder, WEIGHTS), metadata={"format": "pt"})
    shutil.copymode(Path(folder, CONFIG), Path(folder, WEIGHTS))  # safetensors writes 0600; others may read it too


def load_adapter(
    model: nn.Module, folder: str | Path, *, hf_names: Callable[[str], str], dtype: torch.dtype | None = None
) -> LoRA:
    """Add the adapters that a PEFT folder holds to `model`, whose weights are loaded, and freeze all else.

    Everything is checked before the model is changed. A dropout that the adapter was trained with is not applied.

    Args:
        hf_names: our name of a Linear's weight -> the Hugging Face name of it.
        dtype: of the adapters' parameters; the weight's when None, to which the file's values are rounded.

    Returns:
        What the adapters are; save_adapter() with it writes the same function.

    Raises:
        ModelError: as read_lora() and fill_adapters(), or the model has adapters already.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(f"{folder}: the model is on the meta device; load its weights before its adapter")
    lora = read_lora(model, folder, hf_names=hf_names)
    add_lora(model, lora, seed=0, dtype=dtype)  # what it draws is overwritten
    fill_adapters(model, folder, hf_names=hf_names)
    return lora


def read_lora(model: nn.Module, folder: str | Path, *, hf_names: Callable[[str], str]) -> LoRA:
    """What the adapters of a PEFT folder are, for add_lora(); `model` may be on the meta device and is not changed.

    Raises:
        ModelError: a file is missing or damaged, the config asks for what LoRA here does not define, or the tensors
            are not those that the config asks for in this model.
    """
    path = Path(folder, CONFIG)
    config = _read_config(path)
    names = {_module_name(hf_names, name): name for name, _ in linears(model)}
    chosen = [names[theirs] for theirs in _targeted(config, names, where=str(path))]
    if not chosen:
        raise ModelError(
            f"{path}: target_modules {config.get('target_modules')} match no linear layer of the model; "
            "load it into the model that base_model_name_or_path names"
        )
    try:
        lora = LoRA(
            rank=config.get("r"),  # pyright: ignore[reportArgumentType] (what is no number is refused by LoRA)
            alpha=config.get("lora_alpha"),  # pyright: ignore[reportArgumentType]
            targets=shortest_targets(chosen, names.values()),
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
        )
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    modules = dict(linears(model))
    shapes: dict[str, tuple[int, ...]] = {}
    for name in chosen:
        rows, columns = modules[name].out_features, modules[name].in_features
        parts = {"a": (lora.rank, columns), "b": (rows, lora.rank)} | ({"magnitude": (rows,)} if lora.dora else {})
        shapes |= {_peft_name(hf_names, name, part): shape for part, shape in parts.items()}
    _open(Path(folder, WEIGHTS), shapes)
    return lora


def fill_adapters(model: nn.Module, folder: str | Path, *, hf_names: Callable[[str], str]) -> None:
    """Copy the tensors of a PEFT folder into the adapters that `model` has; they may be sharded.

    Raises:
        ModelError: the file is missing or damaged, or its tensors are not those of the adapters.
    """
    parameters = {
        _peft_name(hf_names, name, part): parameter
        for name, _, adapter in adapters(model)
        for part, parameter in adapter.named_parameters()
    }
    file = _open(Path(folder, WEIGHTS), {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    for name, parameter in parameters.items():
        fill(parameter, file.read(name))


def _module_name(hf_names: Callable[[str], str], name: str) -> str:
    return hf_names(f"{name}.weight").removesuffix(".weight")


def _peft_name(hf_names: Callable[[str], str], name: str, part: str) -> str:
    return f"{PREFIX}{_module_name(hf_names, name)}.{SUFFIXES[part]}"


def _read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json, refused where it asks for a feature that is not defined here."""
    if not path.is_file():
        raise ModelError(f"{path} does not exist; name a folder that PEFT's save_pretrained wrote")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not JSON: {error}; save the adapter again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise ModelError(f'{path}: peft_type is {kind!r}; only "LORA" adapters can be loaded')
    asked = [f"{key}: {json.dumps(value)}" for key, value in config.items() if _asks_for_more(key, value)]
    if asked:
        raise ModelError(
            f"{path} asks for what is not defined here: {'; '.join(asked)}; merge it with PEFT and load that"
        )
    return config


def _asks_for_more(key: str, value: Any) -> bool:
    """Whether a key of adapter_config.json is a feature that is not defined here, in use; keys to come included."""
    if key in (*READ, *WITHOUT_EFFECT):
        return False
    if key == "init_lora_weights":
        return value not in PLAIN_INITS
    unset = value is None or value is False or value in ("", [], {})  # layers_to_transform 0 is the first layer
    return not (unset or (key == "bias" and value == "none"))


def _targeted(config: Mapping[str, Any], names: Iterable[str], *, where: str) -> list[str]:
    """The Hugging Face module names that a PEFT config adapts; its string targets are regular expressions."""

    def match(key: str) -> set[str]:
        value = config.get(key) or []
        if not isinstance(value, str):
            return set(select(value, names))
        try:
            return {name for name in names if value == ALL_LINEAR or re.fullmatch(value, name)}
        except re.error as error:
            raise ModelError(f"{where}: {key} {value!r} is no regular expression: {error}; correct it") from None

    wanted = match("target_modules") - match("exclude_modules")
    return [name for name in names if name in wanted]


def _open(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> TensorFile:
    """The file of tensors, whose header was found to hold exactly `shapes`."""
    if not path.is_file():
        raise ModelError(f"{path} does not exist; pickled adapters are not opened, save it again as safetensors")
    file = TensorFile(path)
    problems = [f"missing {name} {shape}" for name, shape in shapes.items() if name not in file.shapes]
    problems += [f"unexpected {name} {shape}" for name, shape in file.shapes.items() if name not in shapes]
    for name, shape in shapes.items():
        found, dtype = file.shapes.get(name, shape), file.dtypes.get(name, torch.float32)
        if found != shape or dtype not in FLOATS:
            problems.append(f"{name} is {found} {dtype}, expected {shape} of floats")
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ModelError(
            f"{path}: tensors do not match {CONFIG} and the model: {shown}; load it into the model it was trained on"
        )
    return file
