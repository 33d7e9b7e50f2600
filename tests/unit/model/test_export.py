"""What is exported opens in transformers as the same function, and loads again bit for bit."""

import json
import stat
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.data.batch import collate
from posttrain.data.sample import shift
from posttrain.data.types import Pack
from posttrain.model.build import build_model, fresh_config
from posttrain.model.export import export_model, write_generation_config, write_weights
from posttrain.model.forward import logits
from posttrain.model.load import load_decoder
from posttrain.model.tensor_file import INDEX
from posttrain.model.weights import hf_tensors
from tiny import tiny_model

IDS = [1, 5, 9, 33, 2, 7]


def dense(folder: Path, *, dtype: torch.dtype = torch.float32, tied: bool = False) -> Path:
    """A Qwen3 of 100 tokens."""
    config = fresh_config(
        vocab_size=100, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, mlp_size=64, max_length=64
    )
    config |= {"tie_word_embeddings": tied, "dtype": str(dtype).removeprefix("torch."), "initializer_range": 0.2}
    build_model(folder, config, seed=2)
    path = folder / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def theirs(folder: Path) -> Tensor:
    """transformers' logits of IDS, [T, vocab] float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


@torch.no_grad()
def ours(model) -> Tensor:
    """Our logits of IDS but the last, [T - 1, vocab] float32."""
    pack = Pack(samples=(shift(IDS, [1.0] * len(IDS)),), num_units=1)
    return logits(model, collate(pack, pack_tokens=len(IDS) - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [5e9, 20_000])
@pytest.mark.fault("F25", outcome="CONTINUE")
def test_a_round_trip_keeps_every_bit(tmp_path: Path, dtype: torch.dtype, tied: bool, shard_bytes: float):
    source = dense(tmp_path / "a", dtype=dtype, tied=tied)
    export_model(load_decoder(source, dtype=None), tmp_path / "b", like=source, shard_bytes=shard_bytes)
    assert (tmp_path / "b" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert_same_weights(weights_of(tmp_path / "b"), weights_of(source))
    again = load_decoder(tmp_path / "b", dtype=None)
    for (name, one), (_, other) in zip(
        again.named_parameters(), load_decoder(source, dtype=None).named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_a_mixture_of_experts_round_trips(tmp_path: Path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = Qwen3MoeConfig(vocab_size=100, num_experts=6, num_experts_per_tok=2, **sizes, **heads)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "a")
    export_model(load_decoder(tmp_path / "a", dtype=None), tmp_path / "b", like=tmp_path / "a")
    assert_same_weights(weights_of(tmp_path / "b"), weights_of(tmp_path / "a"))


@pytest.mark.fault("F25", outcome="CONTINUE")
def test_shards_open_in_transformers_with_the_same_logits(tmp_path: Path):
    source = dense(tmp_path / "a")
    export_model(load_decoder(source), tmp_path / "b", like=source, shard_bytes=20_000)
    shards = sorted((tmp_path / "b").glob("*.safetensors"))
    count = len(shards)
    assert count > 3 and not (tmp_path / "b" / "model.safetensors").exists()
    assert [path.name for path in shards] == [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    assert torch.equal(theirs(tmp_path / "b"), theirs(source))


def test_an_index_names_every_tensor_and_their_size(tmp_path: Path):
    source = dense(tmp_path / "a")
    export_model(load_decoder(source), tmp_path / "b", like=source, shard_bytes=20_000)
    index = json.loads((tmp_path / "b" / INDEX).read_text())
    found = {path.name: load_file(path) for path in (tmp_path / "b").glob("*.safetensors")}
    assert index["weight_map"] == {name: shard for shard, tensors in found.items() for name in tensors}
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in found.values()]
    assert index["metadata"] == {"total_size": sum(sizes)}
    assert all(size <= 20_000 or len(tensors) == 1 for size, tensors in zip(sizes, found.values(), strict=True))


def test_weights_replace_those_that_the_folder_held(tmp_path: Path):
    model = load_decoder(dense(tmp_path))
    before = theirs(tmp_path)
    write_weights(tmp_path, model, shard_bytes=20_000)
    assert not (tmp_path / "model.safetensors").exists() and torch.equal(theirs(tmp_path), before)
    write_weights(tmp_path, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(theirs(tmp_path), before)


@pytest.mark.parametrize("shard_bytes", [5e9, 20_000])
def test_who_may_read_the_config_may_read_the_weights(tmp_path: Path, shard_bytes: float):
    source = dense(tmp_path)
    (source / "config.json").chmod(0o644)
    write_weights(source, load_decoder(source), shard_bytes=shard_bytes)
    assert {stat.S_IMODE(path.stat().st_mode) for path in source.glob("*.safetensors")} == {0o644}


def test_tokenizer_and_template_travel_and_a_manifest_does_not(tmp_path: Path):
    source = tiny_model(tmp_path / "a")
    (source / "manifest.json").write_text("{}")
    (source / "optimizer.bin").write_text("")
    export_model(load_decoder(source), tmp_path / "b", like=source)
    expected = {path.name for path in source.iterdir()} - {"manifest.json", "optimizer.bin"}
    assert {path.name for path in (tmp_path / "b").iterdir()} == expected
    for name in expected:
        assert (tmp_path / "b" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.fault("F37", outcome="CONTINUE")
def test_a_grown_vocabulary_opens_in_transformers(tmp_path: Path):
    source = dense(tmp_path / "a")
    model = load_decoder(source, vocab_size=110)
    facts = export_model(model, tmp_path / "b", like=source)
    before, after = (
        json.loads((source / "config.json").read_text()),
        json.loads((tmp_path / "b/config.json").read_text()),
    )
    assert after == before | {"vocab_size": 110} and facts["vocab_size"] == 110
    assert weights_of(tmp_path / "b")["model.embed_tokens.weight"].shape == (110, 32)
    grown, old = theirs(tmp_path / "b"), theirs(source)
    assert grown.shape == (len(IDS), 110)
    assert torch.equal(grown[:, :100], old) or torch.allclose(grown[:, :100], old, atol=1e-6)
    torch.testing.assert_close(ours(model), grown[:-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours(model)[:, :100], ours(load_decoder(source)), atol=1e-6, rtol=0)
    # The mean of the head's rows gives the mean of the logits.
    torch.testing.assert_close(grown[:, 100:], old.mean(-1, keepdim=True).expand(-1, 10), atol=1e-5, rtol=0)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_names_the_dtype_that_was_written(tmp_path: Path, key: str):
    source = dense(tmp_path / "a", dtype=torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config | {key: "bfloat16"}))
    export_model(load_decoder(source, dtype=torch.float32), tmp_path / "b", like=source)
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == config | {key: "float32"}


def test_a_dequantized_model_is_not_called_quantized(tmp_path: Path):
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    source = tmp_path / "a"
    GptOssForCausalLM(GptOssConfig(vocab_size=100, **sizes, **heads)).to(torch.bfloat16).save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(115, 125, (experts, rows, columns // 32), dtype=torch.uint8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    export_model(load_decoder(source, dtype=None), tmp_path / "b", like=source)
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == config
    again = load_decoder(tmp_path / "b", dtype=None)
    for (name, one), (_, other) in zip(
        again.named_parameters(), load_decoder(source, dtype=None).named_parameters(), strict=True
    ):
        assert one.dtype == torch.bfloat16 and torch.equal(one, other), name


def test_facts_tell_weights_apart_and_not_shards(tmp_path: Path):
    source = dense(tmp_path / "a")
    model = load_decoder(source)
    whole = export_model(model, tmp_path / "b", like=source)
    assert whole == export_model(model, tmp_path / "c", like=source, shard_bytes=20_000)
    assert whole["parameters"] == sum(tensor.numel() for tensor in weights_of(source).values())
    with torch.no_grad():
        model.norm.weight[3] += 1e-6
    changed = export_model(model, tmp_path / "d", like=source)
    assert {key for key in whole if whole[key] != changed[key]} == {"weights_sha256"}
    narrow = export_model(load_decoder(source, dtype=torch.bfloat16), tmp_path / "e", like=source)
    assert narrow["weights_sha256"] != whole["weights_sha256"]
    assert narrow["architecture_sha256"] == whole["architecture_sha256"]


def test_the_host_holds_one_shard_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = dense(tmp_path)
    made: list[weakref.ref[np.ndarray]] = []
    held: list[int] = []

    def copies(model):  # as from a GPU: each tensor is new on the host
        for name, tensor in hf_tensors(model):
            array = tensor.detach().numpy().copy()
            made.append(weakref.ref(array))  # lives as long as a tensor on it
            held.append(sum(each.nbytes for ref in made if (each := ref()) is not None))
            yield name, torch.from_numpy(array)
            del array, each

    monkeypatch.setattr("posttrain.model.export.hf_tensors", copies)
    write_weights(source, load_decoder(source), shard_bytes=20_000)
    assert len(held) > 3 and 0 < max(held) <= 2 * 20_000  # a shard, and the tensor that did not fit in it


@pytest.mark.parametrize(
    ("known", "stops", "written"),
    [(None, (7,), 7), ({"eos_token_id": 7}, (7,), 7), ({"eos_token_id": [7, 9]}, (8, 7), [8, 7, 9])],
)
def test_every_stop_token_is_written_beside_those_that_the_folder_knew(tmp_path: Path, known, stops, written):
    path = tmp_path / "generation_config.json"
    if known is not None:
        path.write_text(json.dumps(known | {"temperature": 0.5}))
    write_generation_config(tmp_path, stop_ids=stops, pad_id=1)
    found = json.loads(path.read_text())
    assert (found["eos_token_id"], found["pad_token_id"]) == (written, 1)
    assert found.get("temperature") == (None if known is None else 0.5)
