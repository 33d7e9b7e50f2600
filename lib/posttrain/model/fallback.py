"""The fallback: transformers' own class of an architecture that families.py does not define, behind Decoder's surface.

Packing works because transformers derives a block-causal mask from position ids that restart, where a model's code
lets it, and the chunked LM head because logits are the head times hidden states, in most models. Neither is promised
by transformers, so each is proved on every load; what cannot be proved is refused by name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.data.types import Batch
from posttrain.errors import ModelError
from posttrain.manifest import json_sha256
from posttrain.model.export import copy_description, mend_dtype, write_tensors
from posttrain.model.families import FAMILIES, parse_config
from posttrain.model.forward import logits
from posttrain.model.load import FROM_FOLDER, read_config
from posttrain.model.tensor_file import open_tensor_files
from posttrain.model.verify import batch_of, random_documents

LOST = (
    "model.backend transformers trains transformers' own class. What is lost: a padded vocabulary, adapters and score "
    "heads, compiled blocks, attention by document boundaries (a mask of T x T elements instead), reading only a "
    "rank's shard of the weights, and the comparison with an independent implementation"
)
"""What a run does without; load_native() prints it once a process."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference of two computations of the same logits, as a share of the largest logit: 800 float32 roundings,
four of the half precisions."""

POWER = 3.0
"""A proof counts only where documents that do mix differ by this many tolerances."""

LOGITS_CHANGED = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0, "lm_head_multiplier": 1.0}
"""Settings by which a model changes what its head gives, and the value that changes nothing. They are read, as a
softcap is within rounding of none where logits are small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeConfig:
    """What the library asks of a model whose shape it does not know."""

    family: str
    vocab_size: int
    hidden_size: int
    max_length: int
    """Longest position the model was made for, tokens."""
    attention_width: int
    """As DecoderConfig's; 0 where the config has no heads to count."""
    heads: dict[str, int] = field(default_factory=dict)
    """Score heads: none here."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding; transformers pads none."""
        return self.vocab_size


class NativeModel(nn.Module):
    """A causal LM of transformers that takes flat batches as Decoder does.

    It stays in evaluation mode, without dropout: a policy must score a token as its sampler did.
    """

    def __init__(self, model: Any, config: NativeConfig):
        """
        Args:
            model: a PreTrainedModel with an LM head.
        """
        super().__init__()
        self.model, self.config = model, config
        self.heads = nn.ModuleDict()

    @property
    def output_head(self) -> nn.Module:
        """The LM head; `weight` is [vocab, hidden], and it has no bias."""
        return self.model.get_output_embeddings()

    def compile_blocks(self) -> None:
        """Does nothing: whether a class of transformers compiles is not known. LOST says so."""

    def forward(self, batch: Batch) -> Tensor:
        """Final hidden states [T, hidden], in the parameters' dtype."""
        # Without a mask and a cache transformers takes documents apart where position ids restart.
        found = self.model.base_model(
            input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False
        )
        return found.last_hidden_state[0]


def native_config(folder: str | Path) -> NativeConfig:
    """Read config.json of a model folder, on disk or S3, for the fallback.

    Raises:
        ModelError: no text model of transformers, code from the folder, or something that the fallback cannot train.
    """
    hf = _hf_config(read_config(folder), where=str(folder))
    return NativeConfig(
        family=hf.model_type,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        max_length=hf.max_position_embeddings,
        attention_width=_attention_width(hf),
    )


def load_native(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> NativeModel:
    """Load transformers' class of a local folder and prove that it can be trained on packs.

    Raises:
        ModelError: as native_config(); tensors have other names than the model's parameters; logits are not
            the head times hidden states; documents of a pack see each other.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    hf = _hf_config(read_config(folder), where=str(folder))
    plain = _check_tensors(folder, hf)
    disable_progress_bar()
    # sdpa ignores a softcap on attention scores, eager does not.
    sdpa = plain._supports_sdpa and getattr(hf, "attn_logit_softcapping", None) is None
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa" if sdpa else "eager", **FROM_FOLDER
    )
    native = NativeModel(model, native_config(folder)).to(device).eval()
    prove(native, where=str(folder))
    _say_once()
    return native


def prove(model: NativeModel, *, where: str = "model", seed: int = 0, num_docs: int = 4) -> dict[str, Any]:
    """Measure on random documents that the chunked head and packing compute what the model computes.

    The tolerance is TOLERANCE of the weights' dtype times the largest logit. That the same documents run into one
    another differ by POWER tolerances is a part of the proof: else nothing would be seen of a leak.

    Returns:
        max_abs_diff of logits, packed against a document at a time, and top1_agreement.

    Raises:
        ModelError: names which of the two does not hold.
    """
    ids = random_documents(model, seed=seed, num_docs=num_docs)  # pyright: ignore[reportArgumentType]
    weight = next(model.parameters())
    batch = batch_of(ids).to(weight.device)
    bounds = batch.cu_seqlens.tolist()[: num_docs + 1]
    flat = batch.input_ids[: bounds[-1]]
    with torch.no_grad():
        packed = logits(model, batch)[: bounds[-1]].float()  # pyright: ignore[reportArgumentType]
        whole = model.model(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False)
        alone = [model.model(input_ids=each[None]).logits[0].float() for each in flat.tensor_split(bounds[1:-1])]
        mixed = model.model(input_ids=flat[None, : model.config.max_length]).logits[0].float()
    expected = torch.cat(alone)
    allowed = TOLERANCE[weight.dtype] * float(expected.abs().max())
    head = float((packed - whole.logits[0, : bounds[-1]].float()).abs().max())
    leak = float((packed - expected).abs().max())
    apart = float((mixed - expected[: len(mixed)]).abs().max())
    problem = None
    if not head <= allowed:
        problem = f"changes its logits after the head, by {head:.2e}; the chunked loss would be that of another model"
    elif not leak <= allowed:
        problem = f"would mix documents: packed, their logits differ by {leak:.2e} from each document by itself"
    elif not apart >= POWER * allowed:
        problem = f"cannot be proved to keep documents apart: run into one another they differ by {apart:.2e} only"
    if problem:
        raise ModelError(
            f"{where}: {model.config.family} {problem} (rounding is allowed {allowed:.1e}). Fix: choose another "
            "architecture, or load in float32 if the numbers are near"
        )
    return {
        "max_abs_diff": max(head, leak),
        "top1_agreement": float((packed.argmax(-1) == expected.argmax(-1)).float().mean()),
    }


def native_tensors(model: NativeModel) -> Iterator[tuple[str, Tensor]]:
    """Weights under their names in a checkpoint, those in memory as load_native() proved; a tied head is left out."""
    for name, parameter in model.model.named_parameters():
        yield name, parameter.detach()


def export_native(model: NativeModel, folder: str | Path, *, like: str | Path) -> dict[str, Any]:
    """Write weights beside the config, tokenizer and template files of the local folder `like`.

    Returns:
        Facts for a manifest, as export_model's.
    """
    copy_description(like, folder)
    mend_dtype(Path(folder, "config.json"), model)
    written = write_tensors(folder, native_tensors(model))
    architecture = json_sha256(asdict(model.config))
    return {"architecture_sha256": architecture, **written, "vocab_size": model.config.vocab_size}


def verify_native(folder: str | Path, source: str | Path) -> dict[str, Any]:
    """Open an exported folder again, prove it, and hold its weights against those of `source`, which it was made from.

    Returns:
        max_abs_diff and top1_agreement, of logits in a pack against a document at a time, of the same class; and
        weights_equal, which takes the place of an independent implementation.

    Raises:
        ModelError: as load_native(), or a weight differs in a bit.
    """
    exported, trained = load_native(folder), load_native(source)
    pairs = zip(native_tensors(exported), native_tensors(trained), strict=True)
    bits = torch.int32  # of the float32 that both were opened in
    if differ := [name for (name, got), (_, want) in pairs if not torch.equal(got.view(bits), want.view(bits))]:
        raise ModelError(
            f"{folder}: {differ[:4]} are not bitwise what was trained. Fix: remove the folder, export again"
        )
    return {**prove(exported, where=str(folder)), "weights_equal": True}


def _hf_config(raw: Mapping[str, Any], *, where: str) -> Any:
    """The config as transformers' class, or why the fallback does not take it."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    family = str(raw.get("model_type"))
    if family not in CONFIG_MAPPING or CONFIG_MAPPING[family] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{where}: model_type {family!r} has no causal LM in the installed transformers. "
            f"Fix: choose one that has, or upgrade transformers; defined by posttrain itself: {', '.join(FAMILIES)}"
        )
    try:
        config = parse_config(raw)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    if reason := _refused(config):
        raise ModelError(f"{where}: {family} {reason}. Fix: choose another architecture")
    return config


def _refused(config: Any) -> str | None:
    if config.get_text_config() is not config:
        return "is more than a text model, which the fallback does not train"
    if getattr(config, "quantization_config", None):
        return "is quantized, which the fallback does not train"
    changed = {name: getattr(config, name, none) for name, none in LOGITS_CHANGED.items()}
    if changed := {name: value for name, value in changed.items() if value not in (None, LOGITS_CHANGED[name])}:
        return f"changes its logits after the head ({changed}), so that the chunked loss would be that of another model"
    if getattr(config, "max_position_embeddings", None) is None:
        return "has no max_position_embeddings: without positions it would mix documents of a pack"
    # Both count from the start of the pack, or from its longest document, which small packs do not show.
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return "attends in chunks counted from the start of a pack, which would cut documents"
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [each for each in rope.values() if isinstance(each, Mapping)]
    if kinds := {str(each.get("rope_type")) for each in (rope, *by_layer)} & {"dynamic", "longrope"}:
        return f"has rope_type {min(kinds)!r}, by which a document's positions depend on the others of its pack"
    return None


def _attention_width(hf: Any) -> int:
    layers, heads = getattr(hf, "num_hidden_layers", 0), getattr(hf, "num_attention_heads", None)
    if not isinstance(heads, int) or not heads:
        return 0
    return layers * heads * (getattr(hf, "head_dim", None) or hf.hidden_size // heads)


def _check_tensors(folder: str | Path, hf: Any) -> Any:
    """Prove names and shapes from the files' headers before memory is taken; the model without values."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    head, parameters = model.get_output_embeddings(), dict(model.named_parameters())
    names = dict(model.named_parameters(remove_duplicate=False)).keys()
    problem = None
    if model.base_model is model or head is None or getattr(head, "bias", None) is not None:
        problem = "has no plain LM head, a matrix without bias"
    elif extra := sorted(model.state_dict().keys() - names):
        problem = f"keeps {extra[:3]} in checkpoints, which are no parameters and would not reach generators"
    if problem:
        raise ModelError(f"{folder}: {hf.model_type} {problem}. Fix: choose another architecture")
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    tied = names - parameters.keys()
    found = {name: file.shapes[name] for name, file in open_tensor_files(folder).items() if name not in tied}
    if differ := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise ModelError(
            f"{folder}: {len(differ)} tensors of {hf.model_type} differ in name or shape between the checkpoint and "
            f"transformers' memory ({', '.join(differ[:4])}), so that weights could not be sent or written. Fix: save "
            "the folder again with transformers if its names are old; stacked experts are not supported"
        )
    return model


@cache
def _say_once() -> None:
    print(LOST, flush=True)
