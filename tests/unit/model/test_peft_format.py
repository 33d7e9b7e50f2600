"""An adapter folder is the same function in PEFT and here, whoever wrote it; what it cannot mean here is refused."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from posttrain.data.batch import collate
from posttrain.data.sample import shift
from posttrain.data.types import Pack
from posttrain.errors import ModelError
from posttrain.model.decoder import Decoder
from posttrain.model.export import export_model
from posttrain.model.load import load_decoder
from posttrain.model.lora import LoRA, adapter_parameters, adapters, add_lora, merge_lora
from posttrain.model.peft_format import CONFIG, WEIGHTS, fill_adapters, load_adapter, read_lora, save_adapter
from posttrain.model.weights import hf_name

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = {
    "lora": LoRA(rank=4, alpha=8),
    "rslora": LoRA(rank=4, alpha=8, rslora=True),
    "dora": LoRA(rank=4, alpha=8, dora=True),
    "some": LoRA(rank=4, alpha=2.5, targets=("layers.1.attention.q_proj", "0.mlp.down_proj")),
}
THEIR_TARGETS = {"some": ["layers.1.self_attn.q_proj", "layers.0.mlp.down_proj"]}
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 120, 30))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Qwen3 that transformers wrote."""
    return _base(tmp_path_factory.mktemp("qwen3"), Qwen3ForCausalLM, Qwen3Config)


def _base(folder: Path, model: type, config: type) -> Path:
    torch.manual_seed(0)
    shape = dict(vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2, initializer_range=0.2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True)
    if config is Qwen3Config:
        heads["head_dim"] = 8
    made = model(config(**shape, **heads, bos_token_id=None, eos_token_id=None))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    made.save_pretrained(folder)
    return folder


def names_of(model: Decoder) -> Callable[[str], str]:
    return partial(hf_name, model.config)


def our_logits(model: Decoder) -> Tensor:
    """[T, vocab], with gradient."""
    sample = shift([*TOKENS.tolist(), 0], [1.0] * (len(TOKENS) + 1))
    batch = collate(Pack(samples=(sample,), num_units=1), pack_tokens=len(TOKENS))
    return (model(batch) @ model.embedding.weight.T)[:, : model.config.vocab_size]


def their_logits(model: Any) -> Tensor:
    return model(TOKENS[None]).logits[0]


def disturb(parameters: Any) -> None:
    """Values as training would leave them: B not zero, magnitudes off the norms."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def peft_model(base: Path, kind: str = "lora", **config: Any) -> Any:
    lora = KINDS[kind]
    defaults = dict(r=lora.rank, lora_alpha=lora.alpha, target_modules=THEIR_TARGETS.get(kind, list(TARGETS)))
    flags = dict(use_rslora=lora.rslora, use_dora=lora.dora, task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**(defaults | flags | config)))
    disturb(parameter for parameter in wrapped.parameters() if parameter.requires_grad)
    return wrapped.eval()


def our_model(base: Path, kind: str = "lora") -> Decoder:
    model = load_decoder(base)
    add_lora(model, KINDS[kind], seed=0)
    disturb(parameter for _, parameter in adapter_parameters(model))
    return model


def save(model: Decoder, folder: Path, lora: LoRA) -> Path:
    save_adapter(model, folder, lora=lora, base="some/base", hf_names=names_of(model))
    return folder


def load(base: Path, folder: Path) -> tuple[Decoder, LoRA]:
    model = load_decoder(base)
    return model, load_adapter(model, folder, hf_names=names_of(model))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_peft_wrote_is_the_same_function_here_with_the_same_gradients(
    base: Path, tmp_path: Path, kind: str
):
    theirs = peft_model(base, kind)
    theirs.save_pretrained(tmp_path)
    ours, lora = load(base, tmp_path)
    logits, their = our_logits(ours), their_logits(theirs)
    torch.testing.assert_close(logits, their, atol=1e-5, rtol=1e-5)
    assert (logits - our_logits(load_decoder(base))).abs().max() > 0.1
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)) / logits.numel()
    (logits * weights).sum().backward()
    (their * weights).sum().backward()
    gradients = {
        name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector"): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    ends = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
    count = 0
    for name, _, adapter in adapters(ours):
        module = hf_name(ours.config, f"{name}.weight").removesuffix(".weight")
        for part, parameter in adapter.named_parameters():
            grad = gradients[f"base_model.model.{module}.{ends[part]}"]
            torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-5)
            count += 1
    assert count == len(gradients)
    assert (lora.rank, lora.scaling, lora.dora) == (4, KINDS[kind].scaling, KINDS[kind].dora)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_we_wrote_is_the_same_function_in_peft(base: Path, tmp_path: Path, kind: str):
    ours = our_model(base, kind)
    save(ours, tmp_path, KINDS[kind])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    torch.testing.assert_close(our_logits(ours), their_logits(theirs), atol=1e-5, rtol=1e-5)
    assert theirs.peft_config["default"].base_model_name_or_path == "some/base"


def test_biased_projections_keep_their_bias_beside_an_adapter(tmp_path: Path):
    folder = _base(tmp_path / "qwen2", Qwen2ForCausalLM, Qwen2Config)
    theirs = peft_model(folder, "dora")
    theirs.save_pretrained(tmp_path / "adapter")
    ours, _ = load(folder, tmp_path / "adapter")
    torch.testing.assert_close(our_logits(ours), their_logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_export_is_pefts_merge_and_unload(base: Path, tmp_path: Path, kind: str):
    theirs = peft_model(base, kind)
    theirs.save_pretrained(tmp_path / "adapter")
    ours, _ = load(base, tmp_path / "adapter")
    merge_lora(ours)
    export_model(ours, tmp_path / "merged", like=base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    unloaded = theirs.merge_and_unload().state_dict()
    assert merged.keys() == unloaded.keys()
    for name, value in unloaded.items():
        torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_comes_back_bitwise(base: Path, tmp_path: Path, kind: str):
    peft_model(base, kind).save_pretrained(tmp_path / "theirs")
    model, lora = load(base, tmp_path / "theirs")
    save(model, tmp_path / "ours", lora)
    theirs, ours = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    again, lora = load(base, tmp_path / "ours")
    save(again, tmp_path / "again", lora)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_fresh_adapter_leaves_the_decoders_logits_bitwise(base: Path):
    model = load_decoder(base)
    before = our_logits(model)
    add_lora(model, KINDS["lora"], seed=0)
    assert torch.equal(our_logits(model), before)


def test_every_linear_of_a_block_is_a_target_of_all_linear(base: Path, tmp_path: Path):
    assert len(add_lora(load_decoder(base), LoRA(targets=("all-linear",)), seed=0)) == 2 * len(TARGETS)
    theirs = peft_model(base, target_modules="all-linear")
    theirs.save_pretrained(tmp_path)
    ours, lora = load(base, tmp_path)
    assert sorted(lora.targets) == sorted(TARGETS)
    torch.testing.assert_close(our_logits(ours), their_logits(theirs), atol=1e-5, rtol=1e-5)


def test_pefts_patterns_and_exclusions_choose_the_same_modules(base: Path, tmp_path: Path):
    theirs = peft_model(base, target_modules=r".*\.1\..*_proj", exclude_modules=["v_proj", "mlp.up_proj"])
    theirs.save_pretrained(tmp_path)
    ours, _ = load(base, tmp_path)
    assert [name for name, *_ in adapters(ours)] == [
        f"layers.1.{name}"
        for name in ("attention.q_proj", "attention.k_proj", "attention.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    torch.testing.assert_close(our_logits(ours), their_logits(theirs), atol=1e-5, rtol=1e-5)


def test_the_config_names_hugging_face_modules(base: Path, tmp_path: Path):
    save(our_model(base), tmp_path / "all", KINDS["lora"])
    save(our_model(base, "some"), tmp_path / "some", KINDS["some"])
    targets = [json.loads((tmp_path / name / CONFIG).read_text())["target_modules"] for name in ("all", "some")]
    assert targets == [sorted(TARGETS), ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias: true"),
        ({"bias": "all"}, 'bias: "all"'),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"layers_to_transform": 0}, "layers_to_transform: 0"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"a_feature_to_come": {"x": 1}}, "a_feature_to_come"),
        ({"target_modules": ["query"]}, "match no linear layer"),
        ({"target_modules": "(q_proj"}, "no regular expression"),
        ({"r": None}, f"{CONFIG}: LoRA rank is None"),
        ({"lora_alpha": "8"}, f"{CONFIG}: LoRA alpha is '8'"),
        ({"r": 8}, r"q_proj.lora_A.weight is \(4, 32\) torch.float32, expected \(8, 32\)"),
        ({"use_dora": True}, "missing base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector"),
        ({"target_modules": ["q_proj"]}, r"unexpected base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"),
    ],
)
def test_a_config_that_means_something_else_is_refused(base: Path, tmp_path: Path, change: dict, message: str):
    save(our_model(base), tmp_path, KINDS["lora"])
    path = tmp_path / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = load_decoder(base)
    with pytest.raises(ModelError, match=message):
        load_adapter(model, tmp_path, hf_names=names_of(model))
    assert not list(adapters(model)) and all(parameter.requires_grad for parameter in model.parameters())


def _rename(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.lora_A.weight"] = tensors.pop("base_model.model.model.layers.1.mlp.up_proj.lora_A.weight")


def _integers(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename, r"missing base_model.model.model.layers.1.mlp.up_proj.lora_A.weight \(4, 32\); unexpected lm_head"),
        (_integers, "torch.int8, expected .* of floats; and 18 more"),
    ],
)
def test_tensors_other_than_the_configs_are_refused(base: Path, tmp_path: Path, change: Callable, message: str):
    save(our_model(base), tmp_path, KINDS["lora"])
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match=message):
        load(base, tmp_path)


def test_damaged_missing_and_pickled_files_are_refused(base: Path, tmp_path: Path):
    save(our_model(base), tmp_path, KINDS["lora"])
    whole = (tmp_path / WEIGHTS).read_bytes()
    for damaged in (whole[:-7], whole[:4], b"", b"\xff" * 64):
        (tmp_path / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ModelError, match="is damaged"):
            load(base, tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled adapters are not opened"):
        load(base, tmp_path)
    for text, message in (("[]", "peft_type is"), ("{", "is not JSON")):
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(ModelError, match=message):
            load(base, tmp_path)
    with pytest.raises(ModelError, match="does not exist; name a folder"):
        load(base, tmp_path / "elsewhere")


def test_a_model_without_weights_yet_is_given_its_adapter_in_steps(base: Path, tmp_path: Path):
    theirs = peft_model(base, "dora")
    theirs.save_pretrained(tmp_path)
    loaded = load_decoder(base)
    with torch.device("meta"):
        model = Decoder(loaded.config)
    add_lora(model, read_lora(model, tmp_path, hf_names=names_of(model)), seed=0)
    model.to_empty(device="cpu").load_state_dict(loaded.state_dict(), strict=False)
    fill_adapters(model, tmp_path, hf_names=names_of(model))
    torch.testing.assert_close(our_logits(model), their_logits(theirs), atol=1e-5, rtol=1e-5)
    other = load_decoder(base)
    add_lora(other, LoRA(rank=8), seed=0)
    with pytest.raises(ModelError, match="tensors do not match"):
        fill_adapters(other, tmp_path, hf_names=names_of(other))


def test_a_model_that_cannot_take_or_give_an_adapter_is_refused(base: Path, tmp_path: Path):
    model = our_model(base)
    with pytest.raises(ModelError, match="pass the LoRA that add_lora"):
        save(model, tmp_path, KINDS["rslora"])
    save(model, tmp_path, KINDS["lora"])
    with pytest.raises(ModelError, match="has adapters already"):
        load_adapter(model, tmp_path, hf_names=names_of(model))
    with torch.device("meta"):
        empty = Decoder(model.config)
    with pytest.raises(ModelError, match="meta device"):
        load_adapter(empty, tmp_path, hf_names=names_of(empty))
    with pytest.raises(ModelError, match="no adapters to save"):
        save(load_decoder(base), tmp_path, KINDS["lora"])
