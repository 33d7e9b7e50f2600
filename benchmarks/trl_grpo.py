"""TRL's GRPOTrainer with vLLM on the same GPU: the baseline of grpo_step.py, run by it."""

import argparse
import random
import tempfile
import time
from itertools import pairwise
from typing import Any

from benchmarks.shapes import SIZES, hf_config

MEMORY_SHARE = 0.35
"""Of the GPU, for the engines of either side together."""


def run_trl(options: argparse.Namespace) -> dict[int, list[dict[str, Any]]]:
    """Rollouts a step -> seconds of every step of TRL's GRPOTrainer; it does one number of rollouts a process."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    (rollouts,) = options.rollouts
    vocab, rng, folder = SIZES[options.size][-1], random.Random(0), tempfile.mkdtemp()
    words = {f"t{n}": n for n in range(vocab - 2)} | {"<eos>": vocab - 2, "<pad>": vocab - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    shape = {key: value for key, value in hf_config(options.size).items() if key not in ("model_type", "architectures")}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(Qwen3Config(**shape, eos_token_id=vocab - 2, pad_token_id=vocab - 1))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    rows = [{"prompt": " ".join(f"t{rng.randrange(vocab - 2)}" for _ in range(options.prompt))} for _ in range(4096)]
    times: list[float] = []

    class Times(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    settings = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=rollouts // options.micro_batch,
        num_generations=options.group,
        max_completion_length=options.new,
        max_steps=options.steps + 1,
        save_strategy="no",
        report_to=[],
        bf16=True,
        learning_rate=1e-6,
        beta=0.0,
        gradient_checkpointing=False,
        disable_tqdm=True,
        use_liger_kernel=options.liger,
        model_init_kwargs={"dtype": "bfloat16", "attn_implementation": options.attention},
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=MEMORY_SHARE,
        vllm_max_model_length=options.prompt + options.new + 8,
        vllm_enable_sleep_mode=options.sleep,
    )
    trainer = GRPOTrainer(
        model=folder,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=fast,
        reward_funcs=lambda completions, **_: [random.random() for _ in completions],
        callbacks=[Times()],
    )
    trainer.train()
    return {rollouts: [{"step_s": end - start} for start, end in pairwise(times)]}
