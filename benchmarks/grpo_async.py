"""What a second GPU brings RL: one GPU on which sampling and training take turns, beside two that do both at once.

The grpo step of the flow, whole, through Ray: random Qwen3-shaped weights, prompts of 128 tokens, rewards by chance,
completions of full length (a random model ends one in 300 early). On one GPU vLLM and the policy share it and nothing
is stale; on two each has its own and groups are sampled one step ahead (`rollout.max_staleness: 1`). Both train as
many completions a step. The baseline of the second row is the first: seconds a step.

    VLLM_USE_FLASHINFER_SAMPLER=0 python -m benchmarks.grpo_async [--size 0.6b] [--prompts 16] [--new 512] [--steps 6]
"""

import argparse
import json
import os
import random
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.inputs import prepared
from benchmarks.report import row, write
from benchmarks.shapes import SIZES

WORDS = 124
"""Of a question: with the template's, the prompt has 128 tokens."""
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
SPECIAL = ("<user>", "<assistant>", "<system>", "<end>", "<pad>")


def prompts(seed: int) -> list[dict[str, Any]]:
    """Questions of random words."""
    rng = random.Random(seed)
    questions = [" ".join(f"t{rng.randrange(1000)}" for _ in range(WORDS)) for _ in range(2048)]
    return [{"messages": [{"role": "user", "content": question}]} for question in questions]


def held_out(seed: int) -> list[dict[str, Any]]:
    """Few, as they are sampled at both ends of a run."""
    return prompts(seed + 1)[:8]


def reward(row: dict[str, Any], completion: str) -> float:
    """By chance, but the same for the same completion."""
    return random.Random(completion).random()


def write_policy(folder: Path, size: str, device: str) -> str:
    """A model folder with random weights and a tokenizer of one word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from benchmarks.fsdp_scaling import write_model

    uri = write_model(folder, size, device)
    words = [f"t{n}" for n in range(SIZES[size][-1] - len(SPECIAL))]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate([*words, *SPECIAL])}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", additional_special_tokens=list(SPECIAL[:3])
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(uri)
    Path(uri, "manifest.json").unlink()  # it lists the files of the weights alone
    return uri


def run(folder: Path, model: str, options: argparse.Namespace, changes: dict[str, Any]) -> list[dict[str, float]]:
    """Metrics of every step of one run."""
    from posttrain.config_file import load_config
    from steps.grpo import grpo

    config = load_config(
        json.dumps(
            {
                "seed": 0,
                "model": {"path": model},
                "data": {
                    "prompts": "benchmarks.grpo_async:prompts",
                    "held_out": "benchmarks.grpo_async:held_out",
                    "max_prompt_tokens": 160,
                    "pack_tokens": options.pack_tokens,
                },
                "method": {"name": "grpo", "group_size": options.group},
                "optim": {"num_steps": options.steps, "lr": 1e-6},
                "reward": {"function": "benchmarks.grpo_async:reward"},
                "rollout.generator": "vllm",
                "rollout.prompts_per_step": options.prompts,
                "rollout.max_new_tokens": options.new,
                "eval.every_steps": 1000,
                "checkpoint.every_minutes": 1000,
                "parallel.data": 1,
                **changes,
            }
        )
    )
    result = grpo(config, **prepared(config, folder).plain())
    assert result is not None
    return [json.loads(line) for line in Path(result["metrics"]).read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.6b", choices=SIZES)
    parser.add_argument("--prompts", type=int, default=16, help="groups of a step")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new", type=int, default=512, help="tokens of a completion")
    parser.add_argument("--pack-tokens", type=int, default=20_480)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="0 tries the script on a CPU")
    parser.add_argument("--engines", type=int, default=1, help="on one GPU")
    parser.add_argument("--out")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    rows, seconds = [], {}
    with tempfile.TemporaryDirectory() as folder:
        model = write_policy(Path(folder), options.size, "cuda" if any(options.gpus) else "cpu")
        for gpus in options.gpus:
            changes = {"parallel.gpus_per_node": gpus, "rollout.max_staleness": int(gpus > 1)}
            changes |= {"rollout.generators": 1 if gpus > 1 else options.engines}
            steps = run(Path(folder, str(gpus)), model, options, changes)[2:-1]  # without compiling, and the end
            seconds[gpus] = median(step["time/step_s"] for step in steps)
            what = (
                f"Qwen3 {options.size}, {options.prompts} x {options.group} completions of 128 + {options.new} tokens, "
            )
            what += f"{gpus} GPUs, " + ("one step ahead" if gpus > 1 else f"{options.engines} engines, in turn")
            first = seconds[options.gpus[0]]
            medians = {name: round(median(s[name] for s in steps if name in s), 4) for name in steps[-1]}
            rows.append(row("grpo_async", what, ours=seconds[gpus], baseline=first, unit="s a step", medians=medians))
    write("grpo_async", rows, options.out)


if __name__ == "__main__":
    main()
