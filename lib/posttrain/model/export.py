"""A Decoder becomes a standard Hugging Face folder that transformers and vLLM open."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from posttrain.manifest import json_sha256
from posttrain.model.decoder import Decoder
from posttrain.model.families import decoder_config
from posttrain.model.heads import CONFIG_KEY, NATIVE, HeadSpec, write_heads
from posttrain.model.tensor_file import INDEX
from posttrain.model.weights import hf_tensors, is_quantized

NOT_COPIED = ("manifest.json", INDEX)
"""Files of a model folder that describe its own bytes, not the model."""

COPIED = (".json", ".jinja", ".txt", ".model")
"""Endings of config, tokenizer and template files."""

SHARD_BYTES = 5e9


def write_weights(folder: str | Path, model: Decoder, *, shard_bytes: float = SHARD_BYTES) -> dict[str, Any]:
    """write_tensors() of a decoder: under Hugging Face names, the vocabulary trimmed, a tied head left out."""
    return write_tensors(folder, hf_tensors(model), shard_bytes=shard_bytes)


def write_tensors(
    folder: str | Path, tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: float = SHARD_BYTES
) -> dict[str, Any]:
    """Write the safetensors of a folder that has its config.json.

    One file where `shard_bytes` hold all tensors, else numbered ones and their index; weights that the folder held
    before are removed. The host holds one shard at a time.

    Returns:
        weights_sha256, over names, dtypes, shapes and bytes, whatever the sharding; parameters, their number.
    """
    folder, facts = Path(folder), _Facts()
    for old in (*folder.glob("model*.safetensors"), folder / INDEX):
        old.unlink(missing_ok=True)
    shards: list[tuple[Path, list[str]]] = []
    for number, shard in enumerate(_shards(facts.seen(tensors), shard_bytes)):
        path = folder / f"model-shard-{number}.tmp"  # how many there will be, which names hold, is not known yet
        save_file(shard, path, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", path)  # safetensors writes 0600; others may read what is published
        shards.append((path, list(shard)))
        shard.clear()  # or it would stay while the next is gathered
    if len(shards) == 1:
        shards[0][0].rename(folder / "model.safetensors")
        return facts.all()
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, start=1):
        final = f"model-{number:05}-of-{len(shards):05}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": facts.num_bytes}, "weight_map": weight_map}
    Path(folder, INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return facts.all()


def write_generation_config(folder: str | Path, *, stop_ids: Sequence[int], pad_id: int) -> None:
    """Tell every engine that opens the folder which tokens end a turn, beside those that it was told already."""
    path = Path(folder, "generation_config.json")
    known = json.loads(path.read_text()) if path.is_file() else {}
    stops = known.get("eos_token_id") or []
    stops = stops if isinstance(stops, list) else [stops]
    stops = list(dict.fromkeys([*stop_ids, *stops]))
    known |= {"eos_token_id": stops if len(stops) > 1 else stops[0], "pad_token_id": pad_id}
    path.write_text(json.dumps(known, indent=2) + "\n")


def export_model(
    model: Decoder, folder: str | Path, *, like: str | Path, shard_bytes: float = SHARD_BYTES
) -> dict[str, Any]:
    """Write weights beside the config, tokenizer and template files of the local folder `like`.

    config.json is rewritten only where the model differs from it: vocab_size after growth, the dtype, and
    quantization, of which nothing is left; it is the same bytes otherwise.

    Returns:
        Facts for a manifest: architecture_sha256, weights_sha256, parameters, vocab_size.
    """
    copy_description(like, folder)
    _mend_config(Path(folder, "config.json"), model, write_heads(model, folder))
    mend_dtype(Path(folder, "config.json"), model)
    written = write_weights(folder, model, shard_bytes=shard_bytes)
    architecture = json_sha256(asdict(model.config))
    return {"architecture_sha256": architecture, **written, "vocab_size": model.config.vocab_size}


def join_export(model: nn.Module) -> None:
    """What the other ranks of a sharded model do while rank 0 is in export_model(): gather with it, in its order."""
    write_heads(model, None)
    for _ in hf_tensors(model):
        pass


def copy_description(like: str | Path, folder: str | Path) -> None:
    """Copy config, tokenizer and template files into `folder`, which is made if it is not there."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for source in sorted(Path(like).iterdir()):
        if source.suffix in COPIED and source.name not in NOT_COPIED:
            shutil.copyfile(source, Path(folder, source.name))


def mend_dtype(path: Path, model: nn.Module) -> None:
    """Let a config.json that names a dtype name the model's; it is the same bytes where it does already."""
    config = json.loads(path.read_text())
    before = json.dumps(config)
    dtype = _dtype(model)
    for key in ("dtype", "torch_dtype"):  # transformers wrote the second until 4.56
        if config.get(key) is not None and config[key] != dtype:
            config[key] = dtype
    if json.dumps(config) != before:
        path.write_text(json.dumps(config, indent=2) + "\n")


def _mend_config(path: Path, model: Decoder, heads: dict[str, HeadSpec]) -> None:
    config = json.loads(path.read_text())
    before = json.dumps(config)
    if heads or CONFIG_KEY in config:
        config[CONFIG_KEY] = heads
    if not model.config.lm_head:
        config["architectures"] = [_classifier(config["model_type"])]
        outputs = int(model.config.heads[NATIVE])
        if len(config.get("id2label") or {}) != outputs:  # it may name them already
            labels = [f"LABEL_{number}" for number in range(outputs)]
            config["id2label"] = {str(number): label for number, label in enumerate(labels)}
            config["label2id"] = {label: number for number, label in enumerate(labels)}
    if decoder_config(config).vocab_size != model.config.vocab_size:
        config["vocab_size"] = model.config.vocab_size
    if is_quantized(config):
        del config["quantization_config"]
    if json.dumps(config) != before:
        path.write_text(json.dumps(config, indent=2) + "\n")


def _classifier(model_type: str) -> str:
    """Name of transformers' class of a model that scores."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[model_type]


def _dtype(model: nn.Module) -> str:
    """Of most weights, as config.json names it: "bfloat16". A few may differ, as a router kept in float32."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        counts[parameter.dtype] += parameter.numel()
    return str(counts.most_common(1)[0][0]).removeprefix("torch.")


class _Facts:
    """What is counted while tensors pass by."""

    def __init__(self):
        self.num_bytes = self.parameters = 0
        self._digests: dict[str, str] = {}

    def seen(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same tensors, on the CPU and contiguous."""
        for name, tensor in tensors:
            tensor = tensor.detach().cpu().contiguous()
            self.num_bytes += tensor.nbytes
            self.parameters += tensor.numel()
            self._digests[name] = _sha256(name, tensor)
            yield name, tensor

    def all(self) -> dict[str, Any]:
        return {"weights_sha256": json_sha256(self._digests), "parameters": self.parameters}


def _sha256(name: str, tensor: Tensor) -> str:
    found = hashlib.sha256(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    found.update(tensor.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    return found.hexdigest()


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: float) -> Iterator[dict[str, Tensor]]:
    """Tensors in order, in groups of at most `shard_bytes`; a larger tensor is a group of its own."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
