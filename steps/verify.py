"""Is our decoder the model that a config or a folder means? `posttrain verify MODEL_OR_CONFIG`. Starts no Ray.

A config alone becomes small models with random weights; a folder with weights is compared as it is. The peers
share no code with us: transformers gives logits and gradients in float32, vLLM the logprobs that it would serve.
"""

import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from posttrain import storage
from posttrain.compute.vllm_logprobs import prompt_logprobs, require_vllm
from posttrain.errors import ConfigError, ModelError, PosttrainError
from posttrain.model.decoder import Decoder
from posttrain.model.families import decoder_config
from posttrain.model.forward import forward
from posttrain.model.load import load_decoder, read_config
from posttrain.model.random_model import small_config, write_random_model
from posttrain.model.verify import (
    GRADIENT_TOLERANCE,
    TOLERANCE,
    batch_of,
    compare_with_transformers,
    random_documents,
)

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
"""A folder with one of these has weights, readable here or not: it is never compared by random ones."""

VLLM_MAX = 1e-3
"""Largest difference of a float32 logprob, nats. Small random models differ by up to 7e-6, on a CPU (vLLM 0.32; every
family but Qwen2, whose small heads it does not serve)."""

VLLM_MEAN, VLLM_MEAN_EXPERTS = 0.02, 0.05
"""Largest mean |difference| of bfloat16 logprobs, nats. Rounding alone makes 0.009 to 0.011 of the same models, and
0.029 of gpt-oss, where a router's near tie falls either way; without positions they are off by 0.23 and more."""


def verify(path: str, *, against: Sequence[str] = ("transformers",), seeds: int = 1) -> dict[str, Any]:
    """Compare with every peer, `seeds` times.

    Args:
        path: a model folder, local or s3://; or a config.json, or a folder that holds no more than one.
        against: of "transformers", "vllm".
        seeds: draws of weights and documents where there is a config only, else of documents.

    Returns:
        path, family, weights ("random" or "folder"), seeds, tensors (parameters compared), and a mapping for
        each peer: the worst of its numbers over all seeds, and the tolerances they keep.

    Raises:
        ConfigError: an unknown peer.
        ModelError: not a model that the decoder defines, or it differs from a peer.
        ComputeError: vllm is asked for and not installed.
    """
    if unknown := [repr(name) for name in against if name not in PEERS]:
        raise ConfigError(f"--against: unknown {', '.join(unknown)}; known: {', '.join(PEERS)}")
    if "vllm" in against:
        require_vllm()
    folder, hf_config = _opened(path)
    config = decoder_config(hf_config)
    if not config.lm_head:
        raise ModelError(f"{path}: a model that only scores has no logits. Fix: verify the model that it grew from")
    with torch.device("meta"):
        tensors = len(list(Decoder(config if folder else decoder_config(small_config(hf_config))).parameters()))
    return {
        "path": path,
        "family": config.family,
        "weights": "folder" if folder else "random",
        "seeds": seeds,
        "tensors": tensors,
        **{
            name: _worst([_compared(path, folder, hf_config, peer=name, seed=seed) for seed in range(seeds)])
            for name in against
        },
    }


def _compared(
    path: str, folder: Path | None, hf_config: Mapping[str, Any], *, peer: str, seed: int
) -> dict[str, float]:
    """One comparison; what its error says of a folder is said of `path`, as a random model's is gone by then."""
    with nullcontext(folder) if folder else _drawn(hf_config, seed=seed) as place:
        try:
            return PEERS[peer](place, seed)
        except PosttrainError as error:
            said = str(error).removeprefix(f"{place}: ")
            said = said if folder else said.replace(str(place), "its random model")
            raise type(error)(f"{path}, seed {seed}: {said}") from error


def _with_transformers(folder: Path, seed: int) -> dict[str, float]:
    found = compare_with_transformers(folder, seed=seed, gradients=True)
    return {**found, "tolerance": TOLERANCE, "gradient_tolerance": GRADIENT_TOLERANCE}


def _with_vllm(folder: Path, seed: int) -> dict[str, float]:
    """Both in the dtype that a GPU is trained and served in, or in float32 without one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_decoder(folder, device=device, dtype=dtype)
    documents = random_documents(model, seed=seed, num_docs=16, without=read_config(folder).get("pad_token_id"))
    with torch.no_grad():
        ours = forward(model, batch_of(documents).to(device)).logprobs.double().cpu()
    experts = model.config.experts is not None
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # vLLM counts what is free before it takes its share
    theirs = prompt_logprobs(folder, documents, dtype=dtype, seed=seed)
    difference = torch.tensor([p for each in theirs for p in each], dtype=torch.float64) - ours
    return _judged(folder, difference, exact=dtype == torch.float32, experts=experts)


def _judged(folder: Path, difference: torch.Tensor, *, exact: bool, experts: bool) -> dict[str, float]:
    """Numbers of vLLM's logprobs minus ours, [N] nats.

    kl_like is the mean of exp(x) - 1 - x: over tokens drawn from us it would be KL(us, vLLM) (Schulman, "Approximating
    KL divergence", k3); these tokens are random, which weighs the tails more.

    Args:
        exact: both in float32; else in bfloat16.
    """
    mean, largest = float(difference.abs().mean()), float(difference.abs().max())
    allowed = VLLM_MAX if exact else VLLM_MEAN_EXPERTS if experts else VLLM_MEAN
    got, what = (largest, "float32 at most") if exact else (mean, "bfloat16 on average")
    if not got <= allowed:
        raise ModelError(
            f"{folder}: logprobs differ from vllm's in {what} by {got:.2e}, allowed {allowed:.0e}. "
            "Fix: compare with transformers first, which names the module"
        )
    kl = float((difference.exp() - 1 - difference).mean())
    return {"max_abs_diff": largest, "mean_abs_diff": mean, "kl_like": kl, "tolerance": allowed}


PEERS: dict[str, Callable[[Path, int], dict[str, float]]] = {"transformers": _with_transformers, "vllm": _with_vllm}
"""Name -> comparison of a model folder, with documents of a seed."""


def _worst(found: list[dict[str, float]]) -> dict[str, float]:
    """Of each number over the seeds: the least agreement, the largest difference."""
    return {key: (min if key == "top1_agreement" else max)(each[key] for each in found) for key in found[0]}


def _opened(path: str) -> tuple[Path | None, Mapping[str, Any]]:
    """The folder on this disk if it has weights, and its config."""
    if storage.is_s3(path):
        hf_config = read_config(path)
        return _with_weights(storage.download(path)), hf_config
    place = Path(path).expanduser()
    if place.is_file():
        with tempfile.TemporaryDirectory(prefix="posttrain-") as name:  # whatever the file is called
            (Path(name) / "config.json").write_bytes(place.read_bytes())
            try:
                return None, read_config(name)
            except ModelError as error:
                raise ModelError(str(error).replace(f"{name}/config.json", path)) from None
    if not place.is_dir():
        raise ModelError(f"{path} does not exist. Fix: name a model folder or a config.json")
    return _with_weights(place), read_config(place)


def _with_weights(folder: Path) -> Path | None:
    return folder if any(each.suffix in WEIGHTS for each in folder.iterdir()) else None


@contextmanager
def _drawn(hf_config: Mapping[str, Any], *, seed: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="posttrain-") as name:
        yield write_random_model(name, small_config(hf_config), seed=seed)
