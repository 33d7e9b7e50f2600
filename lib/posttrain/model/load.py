"""A Hugging Face folder, on disk or S3, becomes a Decoder; or fills one that is already sharded.

Names and shapes of all tensors are proved from the files' headers before memory is taken. Then a pool
of threads reads what this rank's shards need, in chunks, and converts on the target device: host memory
beside the parameters is a few chunks, whatever the size of the model.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from posttrain import storage
from posttrain.errors import ModelError
from posttrain.model.decoder import Decoder
from posttrain.model.families import DecoderConfig, decoder_config
from posttrain.model.heads import HeadSpec, read_heads, with_heads
from posttrain.model.mxfp4 import BLOCK, dequantize
from posttrain.model.regions import Box, Copy, boxes, copy_of, first_element, hull
from posttrain.model.staging import CHUNK_BYTES, Job, Worker, run_jobs
from posttrain.model.tensor_file import TensorFile, open_tensor_files
from posttrain.model.vocabulary import grow, mean_row
from posttrain.model.weights import VOCABULARY, Piece, check_names, hf_shapes, is_native, is_quantized, pieces

DISK_THREADS = 8
S3_THREADS = 16
"""A connection to S3 gives less than a disk does."""

_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

FROM_FOLDER: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
"""How transformers opens a folder: no network, no code of the folder's own, no pickle."""


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder, on disk or S3.

    Raises:
        ModelError: the file is missing or is no JSON object, or it asks for code from the folder.
    """
    path = storage.join(str(folder), "config.json")
    if not storage.exists(path):
        raise ModelError(f"{path} does not exist. Fix: name a Hugging Face model folder, as a run's export/ is one")
    try:
        config = json.loads(storage.read_bytes(path))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is no JSON object. Fix: name a Hugging Face model folder")
    if "auto_map" in config:
        raise ModelError(
            f"{path} asks to run code from the folder (auto_map), which is never done here, whatever the revision. "
            "Fix: remove auto_map where transformers itself has the architecture"
        )
    return config


def load_decoder(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    vocab_size: int | None = None,
    heads: Mapping[str, HeadSpec] | None = None,
    lm_head: bool = True,
    seed: int = 0,
    place: Callable[[Decoder], None] | None = None,
) -> Decoder:
    """Build the decoder that config.json names and fill it from the folder's safetensors, on disk or S3.

    Rows that pad the vocabulary are zero.

    Args:
        dtype: of all parameters; None keeps the checkpoint's own, each parameter its own (MXFP4 becomes bfloat16).
        vocab_size: grow to this many tokens (see vocabulary.py).
        heads: score heads beside those that the folder has; a new one is drawn from `seed`.
        lm_head: off leaves the LM head out; the model then needs the head `score`, as Hugging Face's classes have.
        place: shards the model in place, on the meta device, before it has memory; each rank then takes and reads
            only what it holds. It may add adapters first, which await reset_adapters().

    Raises:
        ModelError: unknown architecture; missing, extra or misshapen tensors; damaged file; vocab_size too small.
        DataError: S3 did not give a range within get_range's budget.
    """
    checkpoint = _Checkpoint.open(folder)
    config = checkpoint.config if vocab_size is None else grow(checkpoint.config, vocab_size)
    config = with_heads(config, heads or {}, lm_head=lm_head)
    with torch.device("meta"):
        model = Decoder(config)
    for name, parameter in model.named_parameters():
        known = name in checkpoint.shapes
        parameter.data = parameter.data.to(dtype or (checkpoint.dtype_of(name) if known else torch.float32))
    if place is not None:
        place(model)
    model = model.to_empty(device=device)
    unfilled = set(_fill(model, checkpoint))
    read_heads(model, folder, {name: spec for name, spec in config.heads.items() if _any(name, unfilled)}, seed=seed)
    left = [name for name in unfilled if not name.startswith("heads.") and is_native(config, name)]
    assert not left, f"{folder}: {left} were not filled"
    return model


def _any(head: str, names: Collection[str]) -> bool:
    return any(name.startswith(f"heads.{head}.") for name in names)


def fill(model: nn.Module, folder: str | Path) -> list[str]:
    """Fill the parameters of a decoder that is built, sharded (DTensor) or not, and materialised on one device.

    Reads only the rows that this rank holds; no collectives. Where `model.config` has a larger vocabulary than the
    folder's config.json, the new rows become the mean of the old ones.

    Returns:
        Names of parameters that a checkpoint of this config does not have (adapters, new heads), left as they were.

    Raises: as load_decoder().
    """
    return _fill(model, _Checkpoint.open(folder))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checkpoint:
    """An opened folder whose tensors are those of its config."""

    folder: str
    config: DecoderConfig
    shapes: Mapping[str, tuple[int, ...]]
    """Of our parameters, whole."""
    pieces: Mapping[str, tuple[Piece, ...]]
    files: Mapping[str, TensorFile]
    """By their names."""

    @classmethod
    def open(cls, folder: str | Path) -> "_Checkpoint":
        hf_config = read_config(folder)
        config, quantized = decoder_config(hf_config), is_quantized(hf_config)
        with torch.device("meta"):
            named = Decoder(config).named_parameters()
        shapes = {name: tuple(p.shape) for name, p in named if is_native(config, name)}
        expected = hf_shapes(config, shapes, quantized=quantized)
        files = open_tensor_files(folder)
        if config.tied_embeddings and "lm_head.weight" not in expected:
            files.pop("lm_head.weight", None)  # some exports write the tied head a second time
        check_names({name: file.shapes[name] for name, file in files.items()}, expected, where=str(folder))
        found = {name: pieces(config, name, shape, quantized=quantized) for name, shape in shapes.items()}
        _check_dtypes(found, files)
        return cls(folder=str(folder), config=config, shapes=shapes, pieces=found, files=files)

    def dtype_of(self, name: str) -> torch.dtype:
        """What holds a parameter of ours without loss."""
        found = self.pieces[name]
        dtypes = (torch.bfloat16 if p.scales else self.files[p.theirs].dtypes[p.theirs] for p in found)
        return reduce(torch.promote_types, dtypes)

    def shape_of(self, piece: Piece) -> tuple[int, ...]:
        """Of a checkpoint tensor, once it is decoded."""
        if piece.scales is None:
            return self.files[piece.theirs].shapes[piece.theirs]
        *rows, groups = self.files[piece.scales].shapes[piece.scales]
        return (*rows, groups * BLOCK)


def _check_dtypes(found: Mapping[str, tuple[Piece, ...]], files: Mapping[str, TensorFile]) -> None:
    for piece in (piece for each in found.values() for piece in each):
        names = [piece.theirs] if piece.scales is None else [piece.theirs, piece.scales]
        allowed = _PLAIN if piece.scales is None else (torch.uint8,)
        for name in names:
            if files[name].dtypes[name] not in allowed:
                raise ModelError(
                    f"{files[name].uri}: {name} has dtype {files[name].dtypes[name]}, expected one of {allowed}. "
                    "Fix: use a checkpoint that is not quantized, or whose config.json says how"
                )


@torch.no_grad()
def _fill(model: nn.Module, checkpoint: _Checkpoint) -> list[str]:
    vocab_size = grow(checkpoint.config, model.config.vocab_size).vocab_size  # pyright: ignore
    unfilled: list[str] = []
    jobs: list[Job] = []
    device = torch.device("cpu")
    for name, parameter in model.named_parameters():
        if name not in checkpoint.shapes:
            unfilled.append(name)
            continue
        _check_shape(checkpoint, name, tuple(parameter.shape))
        local, region = _local(parameter)
        device = local.device
        if not local.numel():
            continue
        if name in VOCABULARY:
            old = checkpoint.config.vocab_size
            local[max(old - region[0].start, 0) :].zero_()
            jobs += _growth(checkpoint, name, local, region, rows=range(old, vocab_size))
        jobs += _reads(checkpoint, name, local, region)
    on_s3 = storage.is_s3(checkpoint.folder)
    run_jobs(jobs, device, threads=S3_THREADS if on_s3 else DISK_THREADS)
    return unfilled


def _check_shape(checkpoint: _Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    expected = checkpoint.shapes[name]
    free = 1 if name in VOCABULARY else 0  # padded here, and perhaps grown
    if shape[free:] != expected[free:]:
        raise ModelError(f"{checkpoint.folder}: {name} has shape {shape} in the model, {expected} by config.json")


def _local(parameter: Tensor) -> tuple[Tensor, Box]:
    """What this rank holds of a parameter, and which region of the whole that is."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), tuple(range(size) for size in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    local = parameter.to_local().detach()
    if local.numel():
        assert tuple(local.shape) == tuple(shape), f"local shape {tuple(local.shape)}, expected {shape}"
    return local, tuple(range(start, start + size) for start, size in zip(offset, shape, strict=False))


@dataclass(frozen=True, slots=True)
class _Read:
    """One run of a checkpoint tensor, and the local elements that it fills."""

    checkpoint: _Checkpoint
    piece: Piece
    box: Box
    copies: tuple[Copy, ...]
    target: Tensor
    target_from: tuple[int, ...]

    def __call__(self, worker: Worker) -> None:
        piece, copy = self.piece, self.copies[0]
        first = first_element(self.box, self.checkpoint.shape_of(piece))
        file = self.checkpoint.files[piece.theirs]
        if worker.device.type == "cpu" and piece.scales is None and copy.covers(self.box):
            out = copy.target_view(self.target, target_from=self.target_from)
            if out.is_contiguous() and out.dtype == file.dtypes[piece.theirs]:
                file.read_into(piece.theirs, first, out)
                return
        lengths = [len(span) for span in self.box]
        if piece.scales is None:
            values = worker.fetch(file, piece.theirs, first, lengths)
        else:
            groups = [*lengths[:-1], lengths[-1] // BLOCK]
            blocks = worker.fetch(file, piece.theirs, first // 2, [*groups, BLOCK // 2])
            scales = worker.fetch(self.checkpoint.files[piece.scales], piece.scales, first // BLOCK, groups)
            values = dequantize(blocks, scales, self.target.dtype)
        source_from = [span.start for span in self.box]
        for each in self.copies:
            each.put(self.target, values, target_from=self.target_from, source_from=source_from)


def _reads(checkpoint: _Checkpoint, name: str, local: Tensor, region: Box) -> Iterator[_Read]:
    """Pieces of one checkpoint tensor share their reads: interleaved rows would otherwise be read twice."""
    groups: dict[str, list[Piece]] = {}
    for piece in checkpoint.pieces[name]:
        groups.setdefault(piece.theirs, []).append(piece)
    for group in groups.values():
        piece, shape = group[0], checkpoint.shape_of(group[0])
        whole = (copy_of(each, checkpoint.shapes[name], shape) for each in group)
        copies = [copy for each in whole if (copy := each.within("target", region))]
        if not copies:
            continue
        if piece.scales is None:
            limit = CHUNK_BYTES // checkpoint.files[piece.theirs].dtypes[piece.theirs].itemsize
            found = boxes(hull(copies), shape, limit)
        else:  # blocks are decoded whole
            limit = CHUNK_BYTES // torch.bfloat16.itemsize // shape[-1]
            found = ((*box, range(shape[-1])) for box in boxes(hull(copies)[:-1], shape[:-1], max(limit, 1)))
        for box in found:
            inside = tuple(copy for each in copies if (copy := each.within("source", box)))
            if inside:
                yield _Read(checkpoint, piece, box, inside, local, tuple(span.start for span in region))


def _growth(checkpoint: _Checkpoint, name: str, local: Tensor, region: Box, *, rows: range) -> Iterator[Job]:
    """What fills the new rows of a vocabulary, where this rank holds any."""
    here = range(max(rows.start, region[0].start), min(rows.stop, region[0].stop))
    if not here:
        return
    (piece,) = checkpoint.pieces[name]
    target = local[here.start - region[0].start : here.stop - region[0].start]
    columns = slice(region[1].start, region[1].stop)

    def put(_: Worker) -> None:
        target.copy_(mean_row(checkpoint.files[piece.theirs], piece.theirs)[columns])

    yield put
