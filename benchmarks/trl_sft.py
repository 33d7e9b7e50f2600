"""TRL's SFTTrainer with packing and Liger's kernels: the baseline of sft.py, run by it.

TRL's own training loop: documents packed best-fit-decreasing into rows of T tokens and laid end to end without padding,
attention by torch's flash kernels under transformers' interface (benchmarks/decoder.py), fused AdamW. "float32" keeps
float32 weights, gradients and moments and computes in bfloat16 by autocast; "bfloat16" keeps all of them in bfloat16,
which is TRL's fastest. Liger's kernels are its Triton ones: it takes others where FlashAttention 4 has brought the
CuTe DSL, and TRL's steps took longer. Liger and the flash kernels need a GPU: a CPU, which only tries the script,
gets transformers' layers and sdpa.
"""

import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decoder import register_flash
from benchmarks.workloads import documents


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds and losses of every step, its documents' lengths in tokens that are targets, and peak memory."""
    sys.modules["cutlass"] = None  # Liger looks whether the DSL can be imported
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    on_gpu = torch.cuda.is_available()
    micro_batches = case["step_tokens"] // (case["trl_batch"] * case["row_tokens"])
    found = documents("W1", case["documents"], seed=0, vocab=case["vocab"], longest=case["row_tokens"])
    model = AutoModelForCausalLM.from_pretrained(
        case["model_uri"],
        dtype=getattr(torch, case["precision"]),
        attn_implementation=register_flash() if on_gpu else "sdpa",
    )
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1}, unk_token="<eos>"))
    times: list[float] = []
    positions: list[Any] = []

    class Times(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**settings(case, folder, micro_batches=micro_batches, on_gpu=on_gpu)),
            train_dataset=Dataset.from_dict({"input_ids": [ids.tolist() for ids in found]}),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>"),
            callbacks=[Times()],
        )
        trainer.model.register_forward_pre_hook(
            lambda module, args, named: positions.append(named["position_ids"]), with_kwargs=True
        )
        trainer.train()
    if on_gpu:
        forwards = [f for module in model.modules() for f in (type(module).forward, module.forward)]
        assert any("liger" in getattr(f, "__module__", "") for f in forwards), "Liger's kernels are not in the model"
    by_step = [positions[n : n + micro_batches] for n in range(0, len(positions), micro_batches)]
    return {
        "seconds": [end - start for start, end in pairwise(times)],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "lengths": [[length for each in step for length in lengths_of(each)] for step in by_step],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }


def settings(case: dict[str, Any], folder: str | Path, *, micro_batches: int, on_gpu: bool) -> dict[str, Any]:
    """Of an SFTConfig: the optimizer of our side, nothing recomputed, nothing saved."""
    return {
        "output_dir": str(folder),
        "max_length": case["row_tokens"],
        "packing": True,
        "packing_strategy": "bfd",
        "per_device_train_batch_size": case["trl_batch"],
        "gradient_accumulation_steps": micro_batches,
        "max_steps": case["steps"] + case["warmup"],
        "use_liger_kernel": on_gpu,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
        "learning_rate": case["lr"],
        "lr_scheduler_type": "constant",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "dataloader_num_workers": 2 if on_gpu else 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def lengths_of(position_ids: Any) -> list[int]:
    """Targets of each document of a row without padding; a document's first token is none."""
    row = position_ids.flatten().cpu().numpy()
    starts = np.append(np.flatnonzero(row == 0), len(row))
    return [int(length) - 1 for length in np.diff(starts)]
