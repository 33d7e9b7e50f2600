"""What a config would cost, before anything runs: memory, time, money and disk; `posttrain plan CONFIG`.

A config, a number of GPUs and their kind enter; a plain dict leaves. No weights are read, no GPU is needed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from posttrain.config import RunConfig
from posttrain.config_method import GRPO
from posttrain.errors import ConfigError
from posttrain.model.build import fresh_config
from posttrain.model.decoder import Decoder
from posttrain.model.families import decoder_config
from posttrain.model.float8 import states_of
from posttrain.model.flops import flop_counts
from posttrain.model.gpus import Gpu, gpu_of
from posttrain.model.load import read_config
from posttrain.model.lora import LoRA, add_lora
from posttrain.model.memory import ERROR, GIB, Memory, Setup, active_parameters, memory
from steps.prepare import TEXT_FILES, model_folder

MFU_DENSE, MFU_SMALL, MFU_MOE = 0.45, 0.35, 0.30
"""Assumed share of the peak: dense from 1 B parameters on, dense below, mixtures of experts. Measured on an H100 for
1.7 B is 0.52 without the optimizer (benchmarks/results/decoder.json)."""
TOKEN_BYTES = 8
"""Of a token in a file, at most: its number and its mask, not compressed."""
HOST_PROCESS_BYTES = 3 * GIB
"""Of a Python process with torch and CUDA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Optimizer steps of one loss."""

    name: str
    steps: int
    packs: int
    """Of one step, over all ranks; of rollouts, at their longest."""
    doc_tokens: int
    """Of one document, at most."""
    loss_share: float
    """Of tokens that the LM head reads, at most."""


def estimate(
    config: RunConfig,
    *,
    gpus: int | None = None,
    gpu: str = "h100",
    price: float | None = None,
    mfu: float | None = None,
) -> dict[str, Any]:
    """The whole plan of a run.

    Args:
        gpus: that train; None is what the config asks for.
        gpu: a name of model/gpus.py.
        price: of one GPU and hour, in any currency; None leaves the cost out.
        mfu: share of the GPU's peak; None takes the assumption above.

    Raises:
        ConfigError: a GPU that is not known, or too few for the config's tensor and context ranks.
        ModelError: the model's config.json cannot be read, or is none that the decoder defines.
    """
    device, model, stages = gpu_of(gpu), meta_model(config), _stages(config)
    setup = _setup(config, stages, gpus)
    count = gpus or max(config.parallel.gpus, setup.data * setup.tensor * setup.context)
    total = sum(parameter.numel() for parameter in model.parameters())
    peak = memory(model, setup)
    if mfu is None:
        moe = model.config.experts is not None
        mfu = MFU_MOE if moe else MFU_DENSE if total >= 1e9 else MFU_SMALL
    times = [_time(config, stage, model, setup, device, mfu) for stage in stages]
    hours = sum(each["hours"] for each in times)
    fits = peak.total <= device.usable_bytes
    return {
        "gpu": gpu.lower(),
        "gpus": count,
        "gpu_source": device.source,
        "parameters": {
            "total": total,
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "active": round(active_parameters(model)),
        },
        "memory": peak.parts() | {"total": peak.total, "moment": peak.moment, "error": ERROR},
        "usable_bytes": device.usable_bytes,
        "fits": fits,
        "changes": [] if fits else changes(config, setup, device.usable_bytes),
        "setup": {key: getattr(setup, key) for key in ("pack_tokens", "micro_batches", "precision", "data", "tensor")}
        | {"activation_checkpointing": setup.activation_checkpointing},
        "mfu": mfu,
        "stages": times,
        "hours": hours,
        "cost": None if price is None else hours * count * price,
        "disk": _disk(config, model, setup, stages),
        "host_bytes": _state_bytes(model, setup) + HOST_PROCESS_BYTES * (setup.data + 2),
        "assumptions": _assumptions(config, mfu),
    }


def changes(config: RunConfig, setup: Setup, usable: float) -> list[dict[str, Any]]:
    """What would take less memory, each computed, the least harmful first; where none alone is enough, those that
    change no number of the training are taken together, one after another.

    Returns:
        [{change, total, fits}].
    """
    model = meta_model(config)
    least = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    single: list[tuple[str, Callable[[Setup], Setup]]] = []
    if setup.activation_checkpointing == "none":
        single.append(("optim.activation_checkpointing: selective", _checkpointing("selective")))
    if setup.pack_tokens // 2 >= least:
        single.append((f"data.pack_tokens: {setup.pack_tokens // 2}, twice the packs", _half_packs))
    if setup.activation_checkpointing != "full":
        single.append(("optim.activation_checkpointing: full", _checkpointing("full")))
    single.append((f"{2 * setup.data} data ranks on as many GPUs", _twice_the_ranks))
    twice = 2 * setup.tensor
    single.append((f"parallel.tensor: {twice}, twice the GPUs", lambda old: replace(old, tensor=twice)))
    if setup.pack_tokens % (4 * setup.context) == 0:
        more = 2 * setup.context
        single.append((f"parallel.context: {more}, twice the GPUs", lambda old: replace(old, context=more)))
    found = [_change(name, memory(model, change(setup)), usable) for name, change in single]
    together, names = setup, []
    for name, change in [each for each in single if "selective" not in each[0]]:
        together = change(together)
        names.append(name)
        if len(names) > 1 and not any(each["fits"] for each in found):
            found.append(_change(" + ".join(names), memory(model, together), usable))
    if setup.precision != "bfloat16_stochastic":
        stochastic = memory(model, replace(setup, precision="bfloat16_stochastic"))
        found.append(_change("optim.precision: bfloat16_stochastic", stochastic, usable))
    if all(parameter.requires_grad for parameter in model.parameters()):
        add_lora(model, LoRA(targets=("all-linear",)), seed=config.seed)
        found.append(_change("LoRA of rank 16 on all Linears", memory(model, setup), usable))
    return found


def memory_problem(config: RunConfig, usable: float) -> str | None:
    """Why a run cannot fit a GPU of so many bytes, with what to change; None where it may, within the stated error."""
    setup = _setup(config, _stages(config), None)
    peak = memory(meta_model(config), setup)
    if peak.total <= usable * (1 + ERROR):
        return None
    part, size = max(peak.parts().items(), key=lambda item: item[1])
    found = changes(config, setup, usable)
    best = next((each for each in found if each["fits"]), min(found, key=lambda each: each["total"]))
    return (
        f"a rank would need {peak.total / GIB:.1f} GiB at {peak.moment} and its GPU has {usable / GIB:.1f} GiB; the "
        f"largest part is {part}, {size / GIB:.1f} GiB. Fix: {best['change']} ({best['total'] / GIB:.1f} GiB)"
    )


def meta_model(config: RunConfig) -> Decoder:
    """The model of a config on the meta device, with its adapters: shapes without values.

    Raises:
        ModelError: its config.json is not to be had, or the decoder does not define it.
    """
    fresh = config.model.fresh
    if fresh is not None:
        shape = fresh.shape | {"mlp_size": 4 * fresh.hidden_size, "max_length": config.data.pack_tokens}
        hf = fresh_config(**shape)
    else:
        assert config.model.path is not None, "the config's own check lets exactly one of path and fresh through"
        hf = read_config(model_folder(config.model.path, config.model.revision, suffixes=TEXT_FILES))
    with torch.device("meta"):
        model = Decoder(decoder_config(hf))
    if lora := config.model.lora:
        add_lora(model, LoRA(rank=lora.rank, alpha=lora.alpha, targets=lora.targets), seed=config.seed)
    return model


def _checkpointing(mode: str) -> Callable[[Setup], Setup]:
    return lambda old: replace(old, activation_checkpointing=mode)


def _half_packs(old: Setup) -> Setup:
    rows = None if old.loss_rows is None else -(-old.loss_rows // 2)
    return replace(old, pack_tokens=old.pack_tokens // 2, loss_rows=rows, micro_batches=2 * old.micro_batches)


def _twice_the_ranks(old: Setup) -> Setup:
    return replace(old, data=2 * old.data, micro_batches=-(-old.micro_batches // 2))


def _change(name: str, peak: Memory, usable: float) -> dict[str, Any]:
    return {"change": name, "total": peak.total, "fits": peak.total <= usable}


def _stages(config: RunConfig) -> list[Stage]:
    tokens, found = config.data.pack_tokens, []
    if config.warmup:
        packs = config.warmup.packs_per_step
        found.append(
            Stage(name="warmup", steps=config.warmup.num_steps, packs=packs, doc_tokens=tokens, loss_share=1.0)
        )
    steps, method = config.optim.num_steps, config.method
    if not isinstance(method, GRPO):
        packs = method.packs_per_step
        return [*found, Stage(name=method.name, steps=steps, packs=packs, doc_tokens=tokens, loss_share=1.0)]
    sampled = config.rollout.max_new_tokens
    longest = config.data.max_prompt_tokens + sampled
    completions = config.rollout.prompts_per_step * method.group_size
    packs = -(-completions // (tokens // longest))
    share = sampled / longest
    return [*found, Stage(name=method.name, steps=steps, packs=packs, doc_tokens=longest, loss_share=share)]


def _setup(config: RunConfig, stages: list[Stage], gpus: int | None) -> Setup:
    parallel, rl = config.parallel, config.method.name == "grpo"
    together = parallel.ranks_per_pack
    if gpus is not None and gpus < together:
        raise ConfigError(f"--gpus {gpus}: parallel.tensor times parallel.context = {together} GPUs share a pack")
    ranks = parallel.data_ranks if gpus is None else gpus // together
    asked = parallel.gpus if gpus is None else gpus
    share = max(stage.loss_share for stage in stages)
    return Setup(
        pack_tokens=config.data.pack_tokens,
        loss_rows=math.ceil(share * config.data.pack_tokens),
        micro_batches=max(-(-stage.packs // ranks) for stage in stages),
        precision="bfloat16" if config.optim.precision == "auto" else states_of(config.optim.precision),
        activation_checkpointing=config.optim.activation_checkpointing,
        data=ranks,
        tensor=parallel.tensor,
        context=parallel.context,
        expert=parallel.expert,
        reference=isinstance(config.method, GRPO) and config.method.kl_coef is not None,
        generators=-(-config.rollout.generators // parallel.ranks) if rl and asked <= ranks * together else 0,
    )


def _time(config: RunConfig, stage: Stage, model: Decoder, setup: Setup, device: Gpu, mfu: float) -> dict[str, Any]:
    tokens = config.data.pack_tokens
    documents = [stage.doc_tokens] * (tokens // stage.doc_tokens)
    rows = math.ceil(stage.loss_share * sum(documents))
    counts = flop_counts(model)
    pack = counts.step(documents, rows)
    if setup.reference and stage.name == "grpo":
        pack += counts.forward(documents, rows)
    ranks = setup.data * setup.tensor * setup.context
    seconds = stage.packs * pack / (ranks * device.peak * mfu)
    sampling = 0.0
    if stage.name == "grpo":  # at least: every new token of the batch reads all weights once
        sampling = config.rollout.max_new_tokens * 2 * sum(p.numel() for p in model.parameters()) / device.bandwidth
    return {
        "name": stage.name,
        "steps": stage.steps,
        "tokens_per_step": stage.packs * sum(documents),
        "step_s": seconds,
        "sampling_s": sampling,
        "tokens_per_s": stage.packs * sum(documents) / (seconds + sampling),
        "hours": stage.steps * (seconds + sampling) / 3600,
    }


def _state_bytes(model: Decoder, setup: Setup) -> float:
    """Of one checkpoint: every parameter as it is trained, and two moments of each that is."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    return trained * (6 if setup.precision == "bfloat16_stochastic" else 12) + frozen * setup.width


def _disk(config: RunConfig, model: Decoder, setup: Setup, stages: list[Stage]) -> dict[str, float]:
    weights = float(setup.width * sum(parameter.numel() for parameter in model.parameters()))
    rows = [stage for stage in stages if stage.name != "grpo"] if config.data.tokenize == "ahead" else []
    found = {
        # One more than are kept: an older one goes only after the newer verifies.
        "checkpoints": _state_bytes(model, setup) * (config.checkpoint.keep + 1) * len(stages),
        "exports": weights * (len(stages) + 1),
        "tokens": float(TOKEN_BYTES * sum(each.steps * each.packs * config.data.pack_tokens for each in rows)),
    }
    return found | {"total": sum(found.values())}


def _assumptions(config: RunConfig, mfu: float) -> list[str]:
    found = [f"MFU {mfu:g}", "packs full of tokens, all in the loss but prompts", f"memory within {ERROR:.0%}"]
    if config.method.name == "grpo":
        found.append("completions at their longest; sampling at its bound of one read of the weights a token")
    if config.model.backend == "transformers":
        found.append("memory as of posttrain's own decoder, compiled; the transformers backend takes more")
    return found
