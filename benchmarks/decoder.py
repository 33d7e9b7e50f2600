"""Forward and backward of a decoder with its loss on skewed packs: ours beside TRL with Liger and flash attention.

One flat row of T tokens of documents with lognormal lengths (median 350, sigma 1.2, clipped to [16, 8192]), all tokens
in the loss, random Qwen3-shaped weights in bfloat16, no optimizer step on either side. TRL's side is its own
SFTTrainer.compute_loss on the same documents as a padding-free row: TRL's fused LM head, Liger's layer kernels (which
the trainer puts in when training starts, so it is done by hand here), attention by torch's flash kernels through
transformers' attention interface, boundaries worked out once a batch. Each side runs in a process of its own;
the losses of both are in the row.

    python -m benchmarks.decoder [--size 1.7b] [--tokens 16384] [--steps 12] [--out FILE]
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import numpy as np

from benchmarks.report import row, write
from benchmarks.shapes import SIZES, hf_config

PEAK = 989e12
"""Dense bfloat16 FLOP/s of an H100 or H200 by its data sheet."""


def documents(tokens: int, seed: int, vocab: int) -> list[np.ndarray]:
    """Documents of `tokens` + one each in all, so that every input token has a target."""
    rng, left, found = np.random.default_rng(seed), tokens, []
    while left:
        length = min(left, int(np.clip(rng.lognormal(np.log(350), 1.2), 16, 8192)))
        found.append(rng.integers(0, vocab, length + 1))
        left -= length
    return found


def flops(size: str, lengths: list[int]) -> float:
    """Exact FLOPs of forward and backward, all tokens in the loss."""
    import torch

    from posttrain.model.decoder import Decoder
    from posttrain.model.families import decoder_config
    from posttrain.model.flops import flop_counts

    with torch.device("meta"):
        model = Decoder(decoder_config(hf_config(size)))
    return flop_counts(model).step(lengths, sum(lengths))


def run_ours(size: str, tokens: int, steps: int, attention: str) -> dict[str, Any]:
    """Milliseconds a step and the losses, by our decoder with one attention backend."""
    import torch

    from posttrain.data.batch import collate
    from posttrain.data.sample import shift
    from posttrain.data.types import Pack
    from posttrain.model.decoder import Decoder
    from posttrain.model.families import decoder_config
    from posttrain.model.forward import loss_sum
    from posttrain.model.losses.sft import SFTLoss

    config = decoder_config(hf_config(size))
    with torch.device("meta"):
        model = Decoder(config, attention=attention)
    model = model.to(torch.bfloat16).to_empty(device="cuda")
    draw(model)
    model.compile_blocks()

    def batch(seed: int) -> Any:
        samples = [shift(ids, np.ones(len(ids))) for ids in documents(tokens, seed, config.vocab_size)]
        return collate(Pack(samples=tuple(samples), num_units=len(samples)), pack_tokens=tokens).to("cuda")

    def step(made: Any) -> Any:
        loss, _ = loss_sum(model, made, SFTLoss(), scale=1 / tokens)
        loss.backward()
        return loss

    return timed(model, batch, step, steps)


def run_trl(size: str, tokens: int, steps: int) -> dict[str, Any]:
    """The same by TRL's trainer over transformers' Qwen3 with Liger's kernels."""
    import tempfile

    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from transformers.integrations.liger import apply_liger_kernel
    from trl import SFTConfig, SFTTrainer

    settings = {key: value for key, value in hf_config(size).items() if key != "model_type"}
    config = Qwen3Config(**settings)
    config._attn_implementation = register_flash()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    draw(model)
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_length=None,
        use_liger_kernel=True,
        gradient_checkpointing=False,
        bf16=True,
        report_to=[],
        padding_free=True,
        packing=False,
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({"input_ids": [[0, 1, 0]]})
    trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    apply_liger_kernel(trainer.model, settings.liger_kernel_config)
    model = trainer.model.train()
    assert any(
        "liger" in type(module).forward.__module__ or "liger" in module.forward.__module__ for module in model.modules()
    )

    def batch(seed: int) -> Any:
        found = documents(tokens, seed, config.vocab_size)
        # The same T inputs as on our side; transformers shifts labels itself, so a document's last target is lost.
        inputs = [ids[:-1] for ids in found]
        labels = [np.concatenate(([-100], ids[1:])) for ids in inputs]
        flat = {"input_ids": inputs, "labels": labels, "position_ids": [np.arange(len(ids)) for ids in inputs]}
        made = {name: torch.from_numpy(np.concatenate(each))[None].to("cuda") for name, each in flat.items()}
        return made

    def step(made: Any) -> Any:
        loss = trainer.compute_loss(model, dict(made), num_items_in_batch=torch.tensor(tokens, device="cuda"))
        loss.backward()
        return loss

    return timed(model, batch, step, steps)


def register_flash() -> str:
    """torch's flash kernels as an attention implementation of transformers, boundaries read from position_ids."""
    import inspect

    import torch
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    last: dict[str, Any] = {}

    def attention(module, query, key, value, attention_mask, scaling=None, position_ids=None, **_):
        if last.get("ids") is not position_ids:
            starts = torch.nonzero(position_ids[0] == 0).flatten().int()
            cu = torch.cat((starts, torch.tensor([position_ids.shape[1]], dtype=torch.int32, device=starts.device)))
            last.update(ids=position_ids, cu=cu, longest=int(cu.diff().max()))
        # Under autocast norms and rotary positions give float32; transformers' own flash attention casts it as well.
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
        q, k, v = (each[0].transpose(0, 1).to(dtype) for each in (query, key, value))
        cu, longest = last["cu"], last["longest"]
        where = {"scale": scaling, "window_size": (-1, 0), **grouped}
        return varlen_attn(q, k, v, cu, cu, longest, longest, **where)[None], None

    AttentionInterface.register("torch_varlen", attention)
    AttentionMaskInterface.register("torch_varlen", flash_attention_mask)
    return "torch_varlen"


def draw(model: Any) -> None:
    """Random weights of the usual size, norms one."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)


def timed(model: Any, batch: Any, step: Any, steps: int) -> dict[str, Any]:
    """Median milliseconds of a step after two that compile, the losses, and peak memory."""
    import torch

    times, losses, started = [], [], time.perf_counter()
    for number in range(steps + 2):
        made = batch(number)
        model.zero_grad(set_to_none=True)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        loss = step(made)
        end.record()
        torch.cuda.synchronize()
        if number == 1:
            ready = time.perf_counter() - started
        times.append(start.elapsed_time(end))
        losses.append(round(float(loss.detach()), 4))
    peak = torch.cuda.max_memory_allocated() / 2**30
    median = sorted(times[2:])[steps // 2]
    return {"ms": median, "all_ms": times, "losses": losses[:4], "peak_gib": round(peak, 2), "ready_s": round(ready, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.7b", choices=SIZES)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--side", help="one side alone, in this process: flash4, flex, varlen or trl")
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.side:
        shared = (options.size, options.tokens, options.steps)
        found = run_trl(*shared) if options.side == "trl" else run_ours(*shared, options.side)
        print(json.dumps(found), flush=True)
        return
    sides: dict[str, Any] = {}
    for side in ("varlen", "flex", "flash4", "trl"):
        words = ["--size", options.size, "--tokens", str(options.tokens), "--steps", str(options.steps)]
        done = subprocess.run([sys.executable, "-m", "benchmarks.decoder", "--side", side, *words], capture_output=True)
        if done.returncode:
            print(done.stderr.decode()[-3000:], file=sys.stderr)
            sides[side] = None
            continue
        sides[side] = json.loads(done.stdout.decode().strip().splitlines()[-1])
    work = [
        flops(options.size, [len(ids) - 1 for ids in documents(options.tokens, n, 1000)])
        for n in range(options.steps + 2)
    ]
    rows = []
    for side in ("varlen", "flex", "flash4"):
        if sides[side] is None:
            continue
        mine, theirs = sides[side], sides["trl"] or {"ms": float("nan")}
        mfu = np.median([w / (ms / 1e3) / PEAK for w, ms in zip(work[2:], mine["all_ms"][2:], strict=True)])
        workload = f"Qwen3 {options.size}, T {options.tokens}, skewed documents, forward + backward, bfloat16"
        rows.append(
            row(
                "decoder",
                f"{workload}, attention {side}; baseline: TRL + Liger + flash attention",
                ours=options.tokens / mine["ms"] * 1e3,
                baseline=options.tokens / theirs["ms"] * 1e3,
                unit="tokens/s",
                mfu_exact=round(float(mfu), 4),
                measured=mine,
                trl=sides["trl"],
            )
        )
    write("decoder", rows, options.out)


if __name__ == "__main__":
    main()
