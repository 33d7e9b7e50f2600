"""A folder loads bit for bit: from disk or S3, whole or sharded, in its own precision or another, grown or not."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain import storage
from posttrain.errors import DataError, ModelError
from posttrain.model import staging
from posttrain.model.build import build_model, fresh_config
from posttrain.model.decoder import Decoder
from posttrain.model.load import fill, load_decoder, read_config
from tiny import tiny_model

TESTS = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch):
    """Tiny models too are read in many chunks."""
    for module in ("staging", "load"):
        monkeypatch.setattr(f"posttrain.model.{module}.CHUNK_BYTES", 2048)


def dense(folder: Path, *, vocab: int = 300, hidden: int = 64, dtype: torch.dtype = torch.float32) -> Path:
    """A Qwen3 with an own head; its matrices are sharded over 8 ranks without padding."""
    shape = fresh_config(
        vocab_size=vocab, hidden_size=hidden, num_layers=2, num_heads=8, num_kv_heads=4, mlp_size=128, max_length=64
    )
    build_model(folder, shape | {"tie_word_embeddings": False}, seed=1)
    if dtype != torch.float32:
        save(folder, {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()})
    return folder


def moe(folder: Path) -> Path:
    """A Qwen3-MoE as transformers saves it: a matrix an expert and projection."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=6,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def gpt_oss(folder: Path, *, quantized: bool) -> Path:
    """A GPT-OSS as transformers saves it; its experts packed where `quantized`."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    if quantized:
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            experts, columns, rows = tensors.pop(name).shape
            blocks = (experts, rows, columns // 32, 16)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, blocks, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(115, 125, blocks[:-1], dtype=torch.uint8)
        save(folder, tensors)
        change_config(folder, {"quantization_config": {"quant_method": "mxfp4"}})
    return folder


def save(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, change: dict) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def to_s3(folder: Path, uri: str) -> str:
    for path in folder.iterdir():
        storage.write_bytes(storage.join(uri, path.name), path.read_bytes())
    return uri


def assert_equal(ours: Decoder, theirs: Decoder) -> None:
    pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    for (name, one), (other_name, other) in pairs:
        assert name == other_name and one.dtype == other.dtype and torch.equal(one, other), name


MAKERS = {
    "dense": dense,
    "moe": moe,
    "gpt_oss": lambda folder: gpt_oss(folder, quantized=False),
    "mxfp4": lambda folder: gpt_oss(folder, quantized=True),
}


def test_dense_parameters_are_the_tensors_of_the_file(tmp_path: Path):
    model, tensors = load_decoder(dense(tmp_path), dtype=None), load_file(tmp_path / "model.safetensors")
    assert torch.equal(model.embedding.weight[:300], tensors["model.embed_tokens.weight"])
    assert not model.embedding.weight[300:].any() and not model.output_head.weight[300:].any()
    assert torch.equal(model.output_head.weight[:300], tensors["lm_head.weight"])
    assert torch.equal(model.layers[1].attention.k_proj.weight, tensors["model.layers.1.self_attn.k_proj.weight"])
    assert torch.equal(model.layers[0].mlp_norm.weight, tensors["model.layers.0.post_attention_layernorm.weight"])


def test_numbered_experts_are_stacked(tmp_path: Path):
    model, tensors = load_decoder(moe(tmp_path)), load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        part = {
            kind: torch.stack([tensors[f"model.layers.{layer}.mlp.experts.{e}.{kind}_proj.weight"] for e in range(6)])
            for kind in ("gate", "up", "down")
        }
        experts = model.layers[layer].mlp.experts
        assert torch.equal(experts.gate_up_proj, torch.cat([part["gate"], part["up"]], 1).float())
        assert torch.equal(experts.down_proj, part["down"].float())


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_interleaved_experts_are_set_apart(tmp_path: Path, quantized: bool, dtype: torch.dtype | None):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = load_decoder(gpt_oss(tmp_path, quantized=quantized), dtype=dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        ours, prefix = model.layers[layer].mlp.experts, f"model.layers.{layer}.mlp.experts."

        def theirs(name: str) -> Tensor:
            if not quantized:
                return tensors[prefix + name]  # noqa: B023
            return convert_moe_packed_tensors(tensors[f"{prefix}{name}_blocks"], tensors[f"{prefix}{name}_scales"])  # noqa: B023

        gate_up, down, bias = theirs("gate_up_proj"), theirs("down_proj"), tensors[f"{prefix}gate_up_proj_bias"]
        wanted = dtype or torch.bfloat16
        assert ours.gate_up_proj.dtype == ours.gate_up_bias.dtype == wanted
        assert torch.equal(ours.gate_up_proj, torch.cat([gate_up[..., ::2], gate_up[..., 1::2]], -1).mT.to(wanted))
        assert torch.equal(ours.down_proj, down.mT.to(wanted))
        assert torch.equal(ours.gate_up_bias, torch.cat([bias[:, ::2], bias[:, 1::2]], -1).to(wanted))


@pytest.mark.parametrize("kind", MAKERS)
def test_chunks_change_nothing(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    chunked = load_decoder(MAKERS[kind](tmp_path))
    for module in ("staging", "load"):
        monkeypatch.setattr(f"posttrain.model.{module}.CHUNK_BYTES", 2**24)
    assert_equal(chunked, load_decoder(tmp_path))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_folder_on_s3_loads_as_one_on_disk(
    s3_bucket: str, tmp_path: Path, kind: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
):
    for module in ("staging", "load"):
        monkeypatch.setattr(f"posttrain.model.{module}.CHUNK_BYTES", 16384)
    uri = to_s3(MAKERS[kind](tmp_path), f"{s3_bucket}/models/{kind}")
    assert read_config(uri) == read_config(tmp_path)
    assert_equal(load_decoder(uri, dtype=dtype), load_decoder(tmp_path, dtype=dtype))


def test_each_parameter_may_keep_its_own_dtype(tmp_path: Path):
    tensors = load_file(dense(tmp_path, dtype=torch.bfloat16) / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    save(tmp_path, tensors)
    model = load_decoder(tmp_path, dtype=None)
    assert model.norm.weight.dtype == torch.float32 and model.output_head.weight.dtype == torch.float16
    assert {p.dtype for p in model.layers.parameters()} == {torch.bfloat16}
    assert torch.equal(model.output_head.weight[:300], tensors["lm_head.weight"])
    assert {p.dtype for p in load_decoder(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


def run_ranks(folder: str | Path, out: Path, world: str, *vocab_size: str) -> list[dict]:
    out.mkdir()
    command = [sys.executable, str(TESTS / "fake_ranks.py"), str(folder), str(out), world, *vocab_size]
    subprocess.run(command, check=True, timeout=300)
    return [torch.load(path, weights_only=True) for path in sorted(out.iterdir())]


def assert_ranks_hold(ranks: list[dict], model: Decoder) -> None:
    """Every local shard is its region of the whole, and together they hold every element."""
    for name, parameter in model.named_parameters():
        seen = torch.zeros(parameter.shape, dtype=torch.bool)
        for rank in ranks:
            local, offset = rank[name]
            if local.numel():
                place = tuple(slice(o, o + size) for o, size in zip(offset, local.shape, strict=True))
                assert torch.equal(local, parameter[place]), name
                seen[place] = True
        assert seen.all(), name


def test_a_rank_that_holds_an_eighth_reads_an_eighth(proxy, s3_bucket: str, tmp_path: Path):
    folder = dense(tmp_path / "model", vocab=512, hidden=128)  # no padding: every rank has an eighth of all
    uri = to_s3(folder, f"{s3_bucket}/model")
    size = (folder / "model.safetensors").stat().st_size
    ranks = run_ranks(uri, tmp_path / "out", "8")
    assert_ranks_hold(ranks, load_decoder(folder))
    spans = [get.range.removeprefix("bytes=").split("-") for get in proxy.gets]
    read = sum(int(last) - int(first) + 1 for first, last in spans)
    header = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert read == 8 * header + (size - header)


@pytest.mark.parametrize("kind", MAKERS)
def test_shards_along_any_dimension_are_regions_of_the_whole(tmp_path: Path, kind: str):
    folder = MAKERS[kind](tmp_path / "model")
    assert_ranks_hold(run_ranks(folder, tmp_path / "out", "3x2"), load_decoder(folder))


def test_fsdp_shards_of_experts_are_regions_of_the_whole(tmp_path: Path):
    folder = MAKERS["mxfp4"](tmp_path / "model")
    assert_ranks_hold(run_ranks(folder, tmp_path / "out", "3"), load_decoder(folder))


def test_new_rows_are_the_mean_of_the_old_ones(tmp_path: Path):
    folder = dense(tmp_path, vocab=60)
    old, new = load_decoder(folder), load_decoder(folder, vocab_size=70)
    assert new.config.vocab_size == 70 and new.embedding.weight.shape[0] == 128
    for name in ("embedding", "output_head"):
        before, after = getattr(old, name).weight, getattr(new, name).weight
        assert torch.equal(after[:60], before[:60]) and not after[70:].any()
        mean = before[:60].double().mean(0).float().expand(10, -1)
        torch.testing.assert_close(after[60:70], mean, atol=1e-7, rtol=1e-5)
    for name, parameter in old.layers.named_parameters():
        assert torch.equal(parameter, new.layers.get_parameter(name))


def test_padding_rows_become_tokens(tmp_path: Path):
    folder = tiny_model(tmp_path)
    old = load_decoder(folder)
    size = old.config.vocab_size
    new = load_decoder(folder, vocab_size=old.config.padded_vocab_size)
    assert new.embedding.weight.shape == old.embedding.weight.shape and new.output_head.weight is new.embedding.weight
    assert torch.equal(new.embedding.weight[:size], old.embedding.weight[:size])
    assert (new.embedding.weight[size:] != 0).any(1).all()


@pytest.mark.parametrize("world", ["8", "3x2"])
def test_sharded_growth_is_the_growth_of_the_whole(tmp_path: Path, world: str):
    folder = dense(tmp_path / "model", vocab=60)
    ranks = run_ranks(folder, tmp_path / "out", world, "70")
    assert_ranks_hold(ranks, load_decoder(folder, vocab_size=70))


def test_a_smaller_vocabulary_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match="vocab_size 299 is smaller than the model's 300"):
        load_decoder(dense(tmp_path), vocab_size=299)


def test_a_redundant_tied_head_is_ignored(tmp_path: Path):
    folder = tiny_model(tmp_path)
    before = load_decoder(folder)
    tensors = load_file(folder / "model.safetensors")
    save(folder, tensors | {"lm_head.weight": torch.zeros_like(tensors["model.embed_tokens.weight"])})
    model = load_decoder(folder)
    assert model.output_head.weight is model.embedding.weight
    assert_equal(model, before)


def test_fill_leaves_what_the_checkpoint_does_not_have(tmp_path: Path):
    folder = dense(tmp_path)
    model = load_decoder(folder)
    model.heads["value"] = torch.nn.Linear(64, 1)
    kept = model.heads["value"].weight.clone()
    assert fill(model, folder) == ["heads.value.weight", "heads.value.bias"]
    assert torch.equal(model.heads["value"].weight, kept)


def test_fill_refuses_a_model_of_another_shape(tmp_path: Path):
    other = load_decoder(dense(tmp_path / "b", hidden=32))
    with pytest.raises(ModelError, match=r"has shape \(320, 32\) in the model, \(320, 64\) by config\.json"):
        fill(other, dense(tmp_path / "a"))


def test_nothing_is_allocated_for_a_checkpoint_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = dense(tmp_path)
    change_config(folder, {"intermediate_size": 129})
    monkeypatch.setattr(Decoder, "to_empty", lambda *_, **__: pytest.fail("memory was taken"))
    with pytest.raises(ModelError, match=r"has shape \(128, 64\), expected \(129, 64\)"):
        load_decoder(folder)


def test_integers_are_no_weights(tmp_path: Path):
    tensors = load_file(dense(tmp_path) / "model.safetensors")
    save(tmp_path, tensors | {"lm_head.weight": tensors["lm_head.weight"].to(torch.int8)})
    with pytest.raises(ModelError, match=r"lm_head\.weight has dtype torch\.int8"):
        load_decoder(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is no JSON object"),
        ('{"auto_map": {}}', "never done here, whatever the revision"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(root_uri: str, text: str, message: str):
    storage.write_bytes(storage.join(root_uri, "config.json"), text.encode())
    with pytest.raises(ModelError, match=message):
        read_config(root_uri)


def test_a_missing_config_is_refused(root_uri: str):
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        read_config(root_uri)


def test_an_error_of_a_thread_is_raised_as_itself_and_no_thread_stays(proxy, s3_bucket: str, tmp_path: Path):
    from faulty_s3 import Fault

    uri = to_s3(dense(tmp_path), f"{s3_bucket}/model")
    model = load_decoder(tmp_path)
    seen = len(proxy.gets)
    fill(model, uri)
    headers = 2  # GETs, before the reads
    proxy.script.extend([None] * (headers + (len(proxy.gets) - seen - headers) // 2) + [Fault.FORBIDDEN])
    with pytest.raises(DataError, match="refused with 403"):
        fill(model, uri)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load")]


def test_a_worker_is_used_again_after_an_error():
    done = []

    def fails(_):
        raise ModelError("no")

    with pytest.raises(ModelError, match="no"):
        staging.run_jobs([fails], torch.device("cpu"), threads=1)
    staging.run_jobs([done.append] * 5, torch.device("cpu"), threads=2)
    assert len(done) == 5 and len({id(worker) for worker in done}) <= 2
