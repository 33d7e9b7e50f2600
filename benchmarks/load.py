"""How long does it take to load a checkpoint, and how much host memory? Ours beside transformers' from_pretrained.

A bfloat16 checkpoint of random weights in Qwen3's shape, sharded at 5 GB, is written once and is in the page
cache. Each load is a fresh process, the two in turn; imports, the CUDA context and one small allocation come
before the clock. Host memory is the growth of the peak resident set (VmHWM); pages of a mapped file count, as
they do for a container's limit once they are touched. transformers loads with device_map where accelerate is
installed, and moves the model by `.to(device)` where it is not. On the CPU it hands out the mapped file itself and
has read nothing when it returns: compare loads to a GPU.

    python -m benchmarks.load --size 4b --device cuda [--repeat 3] [--folder /tmp] [--out FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.report import row, write
from benchmarks.shapes import SIZES, hf_config

SHARD_BYTES = 5e9
MIB = 2**20


def shapes_of(size: str) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of the checkpoint (transformers modeling_qwen3)."""
    hidden, layers, heads, kv_heads, head_dim, mlp, vocab = SIZES[size]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        inside = {
            "self_attn.q_proj": (heads * head_dim, hidden),
            "self_attn.k_proj": (kv_heads * head_dim, hidden),
            "self_attn.v_proj": (kv_heads * head_dim, hidden),
            "self_attn.o_proj": (hidden, heads * head_dim),
            "self_attn.q_norm": (head_dim,),
            "self_attn.k_norm": (head_dim,),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in inside.items()}
    return shapes | {"model.norm.weight": (hidden,)}


def write_checkpoint(folder: Path, size: str) -> int:
    """A checkpoint whose tensors differ but are windows on one draw; returns its bytes."""
    shapes = shapes_of(size)
    largest = max(torch.Size(shape).numel() for shape in shapes.values())
    drawn = (torch.randn(largest + len(shapes), generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    for number, (name, shape) in enumerate(shapes.items()):
        count = torch.Size(shape).numel()
        if shards[-1] and (sum(t.nbytes for t in shards[-1].values()) + 2 * count) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = drawn[number : number + count].clone().view(shape)  # clones: save_file refuses windows
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    for file, shard in zip(names, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
        shard.clear()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(hf_config(size)))
    return total


def prepare_ours(folder: str, device: str) -> Callable[[], torch.nn.Module]:
    """Imports done; what is left is the load."""
    from posttrain.model.load import decoder_config, load_decoder, read_config

    decoder_config(read_config(folder))  # imports transformers' config class
    return lambda: load_decoder(folder, device=device, dtype=torch.bfloat16)


def prepare_transformers(folder: str, device: str) -> Callable[[], torch.nn.Module]:
    """Imports done; what is left is the load."""
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3 import modeling_qwen3
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    assert modeling_qwen3.Qwen3ForCausalLM
    if find_spec("accelerate"):
        return lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device)
    return lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)


PREPARE = {"ours": prepare_ours, "transformers": prepare_transformers}


def peak_rss_bytes() -> int:
    """Highest resident set of this process so far (Linux)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def load_once(which: str, folder: str, device: str) -> None:
    """Print seconds, host memory growth in bytes, and a checksum that both loaders must agree on."""
    load = PREPARE[which](folder, device)
    torch.zeros(1, device=device)
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    before = peak_rss_bytes()
    start = time.perf_counter()
    model = load()
    synchronize()
    seconds = time.perf_counter() - start
    grown = peak_rss_bytes() - before
    parameters = [parameter.detach() for parameter in model.parameters()]
    assert {(p.dtype, p.device.type) for p in parameters} == {(torch.bfloat16, torch.device(device).type)}
    # Sums of bit patterns, so that it does not depend on an order; zeros that pad the vocabulary add nothing.
    checksum = sum(int(p.view(torch.int16).sum(dtype=torch.int64)) for p in parameters)
    print(json.dumps({"seconds": seconds, "host_bytes": grown, "checksum": checksum}))


def run(which: str, folder: str, device: str) -> dict[str, Any]:
    """load_once() in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.load", "--once", which, "--folder", folder, "--device", device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: str, device: str, *, repeat: int, folder: str) -> dict[str, Any]:
    """Both loaders in turn on one checkpoint: the row of best seconds."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        total = write_checkpoint(Path(made), size)
        runs: dict[str, list[dict[str, Any]]] = {which: [] for which in PREPARE}
        for round_ in range(repeat + 1):
            for which, found in runs.items():
                result = run(which, made, device)
                if round_:  # the first round brings the files into the page cache
                    found.append(result)
    assert len({result["checksum"] for found in runs.values() for result in found}) == 1, "the loaders differ"
    seconds = {which: [result["seconds"] for result in found] for which, found in runs.items()}
    host = {which: max(result["host_bytes"] for result in found) / MIB for which, found in runs.items()}
    how = "device_map" if find_spec("accelerate") else ".to(device)"
    best, theirs = min(seconds["ours"]), min(seconds["transformers"])
    return row(
        "load",
        f"Qwen3 {size} shape, bfloat16, {total / 1e9:.2f} GB, warm page cache, to {device}, best of {repeat}; "
        f"transformers by {how}",
        ours=best,
        baseline=theirs,
        unit="s",
        ours_median=round(statistics.median(seconds["ours"]), 4),
        baseline_median=round(statistics.median(seconds["transformers"]), 4),
        ours_gb_per_s=round(total / 1e9 / best, 2),
        baseline_gb_per_s=round(total / 1e9 / theirs, 2),
        ours_host_mib=round(host["ours"]),
        baseline_host_mib=round(host["transformers"]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="0.6b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where the checkpoint is made, or lies for --once")
    parser.add_argument("--once", choices=PREPARE, default=None, help="one load of an existing checkpoint")
    parser.add_argument("--out", default=None)
    asked = parser.parse_args()
    if asked.once:
        load_once(asked.once, asked.folder, asked.device)
        return
    write("load", [measure(asked.size, asked.device, repeat=asked.repeat, folder=asked.folder)], asked.out)


if __name__ == "__main__":
    main()
