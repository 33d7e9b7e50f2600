"""A checkpoint loads to a GPU bit for bit as to the CPU, through pinned buffers and many streams."""

from pathlib import Path

import pytest
import torch

from posttrain.model.export import export_model
from posttrain.model.load import fill, load_decoder
from posttrain.model.mxfp4 import dequantize
from tiny_families import FAMILIES, random_config, random_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_load_to_the_gpu_equals_one_to_the_cpu(
    tmp_path: Path, family: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
):
    for module in ("staging", "load"):
        monkeypatch.setattr(f"posttrain.model.{module}.CHUNK_BYTES", 4096)
    random_model(random_config(family, 0), tmp_path)
    on_gpu, on_cpu = load_decoder(tmp_path, device="cuda", dtype=dtype), load_decoder(tmp_path, dtype=dtype)
    for (name, one), (_, other) in zip(on_gpu.named_parameters(), on_cpu.named_parameters(), strict=True):
        assert one.is_cuda and one.dtype == other.dtype and torch.equal(one.cpu(), other), name
    with torch.no_grad():
        for parameter in on_gpu.parameters():
            parameter.fill_(torch.nan)  # still under way when fill() begins
    assert fill(on_gpu, tmp_path) == []
    for (name, one), (_, other) in zip(on_gpu.named_parameters(), on_cpu.named_parameters(), strict=True):
        assert torch.equal(one.cpu(), other), name


def test_mxfp4_decodes_on_the_gpu_as_on_the_cpu():
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    for dtype in (torch.bfloat16, torch.float32):
        found, expected = dequantize(blocks.cuda(), scales.cuda(), dtype).cpu(), dequantize(blocks, scales, dtype)
        assert torch.equal(found.nan_to_num(1234.0), expected.nan_to_num(1234.0))
        assert torch.equal(found.isnan(), expected.isnan())


def test_a_model_on_the_gpu_exports_the_bytes_of_one_on_the_cpu(tmp_path: Path):
    source = tmp_path / "model"
    random_model(random_config("qwen3", 0), source)
    facts = [
        export_model(load_decoder(source, device=device), tmp_path / device, like=source) for device in ("cuda", "cpu")
    ]
    assert facts[0] == facts[1]
