"""Our decoder is the same function as transformers', packed or not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.data.batch import collate
from posttrain.data.sample import shift
from posttrain.data.types import Pack
from posttrain.errors import ModelError
from posttrain.model.build import build_model, fresh_config
from posttrain.model.decoder import Decoder
from posttrain.model.export import export_model
from posttrain.model.forward import logits
from posttrain.model.load import load_decoder
from posttrain.model.verify import compare_with_transformers
from tiny import tiny_model


def pack_of(documents: list[list[int]]) -> Pack:
    return Pack(samples=tuple(shift(ids, [1.0] * len(ids)) for ids in documents), num_units=len(documents))


def random_documents(seed: int, count: int, vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, rng.integers(2, 40)).tolist() for _ in range(count)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "layers", "vocab", "tied"),
    [(4, 2, 2, 300, True), (4, 1, 3, 257, True), (6, 6, 1, 128, False), (8, 2, 2, 191, False)],
)
def test_logits_equal_transformers(tmp_path: Path, heads: int, kv_heads: int, layers: int, vocab: int, tied: bool):
    config = fresh_config(
        vocab_size=vocab,
        hidden_size=8 * heads,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_size=48,
        max_length=128,
    )
    build_model(tmp_path, config | {"tie_word_embeddings": tied, "initializer_range": 0.2}, seed=heads)
    assert compare_with_transformers(tmp_path)["max_abs_diff"] <= 1e-4


def test_the_comparison_notices_another_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_model(tmp_path)
    monkeypatch.setattr("posttrain.model.attention.rotate", lambda x, cos, sin: x)  # a decoder without positions
    with pytest.raises(ModelError, match="logits differ from transformers"):
        compare_with_transformers(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path):
    (tiny_model(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no \.safetensors"):
        load_decoder(tmp_path)


def test_packed_logits_equal_one_document_at_a_time(tmp_path: Path):
    model = load_decoder(tiny_model(tmp_path))
    documents = random_documents(0, 7, 200)
    size = sum(len(ids) - 1 for ids in documents)
    packed = logits(model, collate(pack_of(documents), pack_tokens=size + 11))
    start = 0
    for ids in documents:
        alone = logits(model, collate(pack_of([ids]), pack_tokens=len(ids) - 1))
        torch.testing.assert_close(packed[start : start + len(ids) - 1], alone, atol=1e-5, rtol=1e-5)
        start += len(ids) - 1


def test_a_document_cannot_see_another(tmp_path: Path):
    model = load_decoder(tiny_model(tmp_path))
    documents = random_documents(1, 3, 200)
    size = sum(len(ids) - 1 for ids in documents)
    before = logits(model, collate(pack_of(documents), pack_tokens=size))
    documents[1] = [(token + 1) % 200 for token in documents[1]]
    after = logits(model, collate(pack_of(documents), pack_tokens=size))
    first, second = len(documents[0]) - 1, len(documents[1]) - 1
    assert torch.equal(before[:first], after[:first])
    assert torch.equal(before[first + second :], after[first + second :])
    assert not torch.equal(before[first : first + second], after[first : first + second])


def test_a_token_cannot_see_its_future(tmp_path: Path):
    model = load_decoder(tiny_model(tmp_path))
    ids = list(range(10, 30))
    before = logits(model, collate(pack_of([ids]), pack_tokens=19))
    changed = logits(model, collate(pack_of([[*ids[:12], 99, *ids[13:]]]), pack_tokens=19))
    assert torch.equal(before[:12], changed[:12])
    assert not torch.equal(before[12:], changed[12:])


def test_export_of_a_loaded_folder_is_bitwise_the_folder(tmp_path: Path):
    source = tiny_model(tmp_path / "a")
    export_model(load_decoder(source), tmp_path / "b", like=source)
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (tmp_path / "b" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_vocabulary_is_padded_in_memory_and_trimmed_on_disk(tmp_path: Path):
    from safetensors import safe_open

    model = load_decoder(tiny_model(tmp_path))
    config = model.config
    assert config.padded_vocab_size % 64 == 0 and config.padded_vocab_size > config.vocab_size
    assert model.embedding.weight.shape[0] == config.padded_vocab_size
    assert not model.embedding.weight[config.vocab_size :].any()
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        assert tensors.get_slice("model.embed_tokens.weight").get_shape()[0] == config.vocab_size
    assert logits(model, collate(pack_of([[1, 2, 3]]), pack_tokens=2)).shape == (2, config.vocab_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not defined"),
        ({"num_hidden_layers": 3}, r"missing model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"unexpected model\.layers\.1"),
        ({"intermediate_size": 65}, r"has shape \(64, 32\), expected \(65, 32\)"),
        ({"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(tmp_path: Path, change: dict, message: str):
    folder = tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message):
        load_decoder(folder)


def test_a_damaged_file_is_refused(tmp_path: Path):
    folder = tiny_model(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="is damaged"):
        load_decoder(folder)


def test_same_seed_same_weights(tmp_path: Path):
    first, second = load_decoder(tiny_model(tmp_path / "a", seed=3)), load_decoder(tiny_model(tmp_path / "b", seed=3))
    other = load_decoder(tiny_model(tmp_path / "c", seed=4))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    assert isinstance(first, Decoder)
