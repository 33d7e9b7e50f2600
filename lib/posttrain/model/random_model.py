"""A model of any family with random weights, small enough to compare in seconds: what a config asks, nothing learned.

A published config.json is cut in its sizes and in nothing else, so that every flag, ratio, window and
scaling of the real model takes part in the comparison.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from posttrain.model.families import parse_config

LAYERS = 4
KV_HEADS, HEADS = 2, 16
HEAD_DIM = 64
EXPERTS = 8
WINDOW = 16
"""Bites within the 64 tokens of a compared document."""
CONTEXT = 32
"""Of a scaled RoPE's first training; the compared documents reach beyond it."""
SIZES = {"vocab_size": 503, "hidden_size": 128, "sliding_window": WINDOW}
"""Largest value of a key. 503 is a prime: no kernel's tile and no padding divides it."""
MLP = 192
"""Of every key that ends in intermediate_size."""
STD = 0.1
"""Of random weights. Rounding alone makes two right decoders of llama's shape differ by 7e-6 of a logit in float32
and by 0.010 nats on average in bfloat16; at 0.2, where logits are wider than a trained model's, by 8e-5 and 0.035."""
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_OF_THE_FILE = ("architectures", "auto_map", "dtype", "torch_dtype", "quantization_config", "transformers_version")
"""What a config.json says of its weights, not of the function."""


def small_config(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of the same model_type and flags whose model has some hundred thousand parameters.

    Kept are the kinds of layers (at least one each), the ratio of heads to KV heads where it is at most 16,
    and that experts are chosen among; sizes shrink to the constants above.

    Raises:
        ModelError: transformers does not know the model_type, or refuses the config.
    """
    config = parse_config(hf_config).to_dict()
    config = {key: value for key, value in config.items() if key not in _OF_THE_FILE and not key.startswith("_")}
    config |= {key: min(config[key], most) for key, most in SIZES.items() if config.get(key)}
    config |= {key: min(config[key], MLP) for key in config if key.endswith("intermediate_size") and config[key]}
    config |= _layers(config) | _heads(config) | _experts(config) | _special_tokens(config)
    if contexts := list(_contexts(config)):
        config = _shrunk(config, min(CONTEXT / max(contexts), 1.0))
    return config


def write_random_model(folder: str | Path, hf_config: Mapping[str, Any], *, seed: int, std: float = STD) -> Path:
    """Draw every parameter of transformers' own class for a config.json and save it as a model folder, float32.

    Norms lie around what the class starts them at (1, or 0 where it adds the 1 itself), everything else around
    0: biases and sinks too, which a fresh model would leave at zero and so untested.

    Raises:
        ModelError: transformers does not know the model_type, or refuses the config.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = parse_config(hf_config)
    with torch.random.fork_rng(devices=[]):  # the class draws too, from the process's generator
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = parameter.clone() if parameter.ndim == 1 and "norm" in name else 0.0
            parameter.normal_(0.0, std, generator=generator).add_(start)
    model.save_pretrained(folder)
    return Path(folder)


def _layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The first layers where they hold every kind; else the first of each kind, and the earliest beside them."""
    total = config["num_hidden_layers"]
    lists = [key for key, value in config.items() if "layer" in key and isinstance(value, list | tuple)]
    lists = [key for key in lists if key != "mlp_only_layers" and len(config[key]) == total]  # an entry a layer
    dense, every = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step") or 1
    sparse = [number not in dense and (number + 1) % every == 0 for number in range(total)]
    kinds = [(sparse[number], *(str(config[key][number]) for key in lists)) for number in range(total)]
    kept = list(range(min(LAYERS, total)))
    found: dict[str, Any] = {}
    if {kinds[number] for number in kept} != set(kinds):
        firsts = {kinds.index(kind) for kind in kinds}
        others = (number for number in range(total) if number not in firsts)
        kept = sorted([*firsts, *_first(others, LAYERS - len(firsts))])
        if "decoder_sparse_step" in config:
            found["decoder_sparse_step"] = 1
    if "mlp_only_layers" in config:
        step = found.get("decoder_sparse_step", every)
        by_step = [(place + 1) % step == 0 for place in range(len(kept))]
        found["mlp_only_layers"] = [place for place, old in enumerate(kept) if by_step[place] and not sparse[old]]
    return {
        "num_hidden_layers": len(kept),
        **{key: [config[key][number] for number in kept] for key in lists},
        **found,
    }


def _first(numbers: Iterator[int], count: int) -> list[int]:
    return [number for _, number in zip(range(count), numbers, strict=False)]


def _heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """Heads that divide the hidden size, which some families want; those without head_dim share it out."""
    all_heads = config["num_attention_heads"]
    all_keys = config.get("num_key_value_heads") or all_heads
    ratio = min(all_heads // all_keys, HEADS)
    keys = min(all_keys, KV_HEADS, HEADS // ratio)
    heads, hidden = keys * ratio, config["hidden_size"]
    found = {"num_attention_heads": heads, "num_key_value_heads": keys}
    if config.get("head_dim"):
        return found | {"hidden_size": hidden // heads * heads, "head_dim": min(config["head_dim"], HEAD_DIM)}
    head_dim = min(hidden // heads, HEAD_DIM) // 2 * 2
    return found | {"hidden_size": heads * head_dim}


def _experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """At most half of them chosen, or a router that is wrong would choose the same."""
    counts = {key: min(config[key], EXPERTS) for key in _EXPERT_COUNTS if config.get(key)}
    if not counts or not config.get("num_experts_per_tok"):
        return counts
    half = max(min(counts.values()) // 2, 1)
    return {**counts, "num_experts_per_tok": min(config["num_experts_per_tok"], half)}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """Ids beyond the small vocabulary become None, those in a list fall away."""
    found: dict[str, Any] = {}
    for key in (key for key in config if key.endswith("token_id")):
        ids = config[key] if isinstance(config[key], list | tuple) else [config[key]]
        below = [each for each in ids if each is not None and each < config["vocab_size"]]
        found[key] = below if below and isinstance(config[key], list | tuple) else next(iter(below), None)
    return found


def _contexts(config: Mapping[str, Any]) -> Iterator[int]:
    """Lengths that a scaled RoPE was first trained for, wherever in the config they stand."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _contexts(value)
        elif key == "original_max_position_embeddings" and value:
            yield value


def _shrunk(config: Mapping[str, Any], share: float) -> dict[str, Any]:
    """The config with all such lengths, and the longest position, times `share`: what one is of another stays."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found[key] = _shrunk(value, share)
        elif str(key).endswith("max_position_embeddings") and value:  # keys of id2label are numbers
            found[key] = max(int(value * share), 1)
        else:
            found[key] = value
    return found
