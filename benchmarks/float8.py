"""Training in float8 beside bfloat16: tokens per second of whole steps, and the loss curves of both on the same data.

One engine as in a run, Qwen3's shapes with random weights, float32 masters and AdamW, one pack of T tokens a step full
of documents of lognormal lengths (benchmarks/decoder.py), every token in the loss. The documents are walks of one
random Markov chain over 256 tokens with 4 successors each, so that there is something to learn: the loss falls from
above ln V towards the chain's entropy, which is in the row. Both sides see the same documents and start from the same
weights, and each runs in a process of its own.

    python -m benchmarks.float8 [--sizes 1.7b 4b] [--tokens 16384] [--steps 60] [--out FILE]
    python -m benchmarks.float8 --matmuls [--sizes 1.7b]

The curve is that of the first size; others run for 8 steps. --matmuls times the bare matmuls and casts of a block.
"""

import argparse
import json
import sys
import time
from statistics import fmean, median
from typing import Any

import numpy as np

from benchmarks.decoder import PEAK, documents
from benchmarks.report import in_a_process, median_ms, row, write
from benchmarks.shapes import SIZES, hf_config

STATES, ODDS = 256, (0.6, 0.2, 0.15, 0.05)
"""Of the chain: its tokens, and the chances of each one's successors."""
ENTROPY = -float(np.dot(ODDS, np.log(ODDS)))
"""Nats a token: what a model that knows the chain loses, but for the first token of a document."""
WARM_UP, SPEED_STEPS = 3, 8
"""Steps that compile and settle; steps where only the speed is asked for."""


class Chain:
    """A random Markov chain over some tokens of a vocabulary."""

    def __init__(self, vocab: int, seed: int):
        rng = np.random.default_rng(seed)
        self.tokens = rng.choice(vocab, STATES, replace=False)
        self.successors = np.stack([rng.permutation(STATES)[: len(ODDS)] for _ in range(STATES)])

    def walk(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Token ids of a document."""
        state, states = int(rng.integers(STATES)), []
        for choice in rng.choice(len(ODDS), length, p=ODDS):
            states.append(state)
            state = int(self.successors[state, choice])
        return self.tokens[states]


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds and losses of every step, by parts of the step, and peak memory."""
    import torch

    from posttrain.compute.collective import Ranks
    from posttrain.data.batch import collate
    from posttrain.data.sample import shift
    from posttrain.data.types import Pack
    from posttrain.model.losses.sft import SFTLoss

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = Ranks(rank=0, world_size=1, meeting="", timeout_s=1, device=device)
    started, tokens = time.perf_counter(), case["tokens"]
    engine, vocab = engine_of(case, ranks), SIZES[case["size"]][-1]
    chain, found = Chain(vocab, seed=0), {"losses": [], "seconds": [], "passes": [], "norms": []}
    for step in range(case["steps"]):
        rng = np.random.default_rng(step)
        ids = [chain.walk(len(each), rng) for each in documents(tokens, step, vocab)]
        samples = tuple(shift(each, np.ones(len(each))) for each in ids)
        batch = collate(Pack(samples=samples, num_units=len(samples)), pack_tokens=tokens).to(device)
        begun = time.perf_counter()
        metrics = engine.train_step(step, [batch], SFTLoss(), denominator=tokens)
        if device.type == "cuda":
            torch.cuda.synchronize()  # the optimizer's kernels are the step's too
        found["seconds"].append(round(time.perf_counter() - begun, 5))
        found["passes"].append(round(metrics["time/forward_s"] + metrics["time/backward_s"], 5))
        found["losses"].append(round(metrics["loss"], 4))
        found["norms"].append(round(metrics["grad_norm"], 4))
        if step + 1 == WARM_UP:
            found["ready_s"] = round(time.perf_counter() - started, 1)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return found | {"peak_gib": round(peak, 2)}


def engine_of(case: dict[str, Any], ranks: Any) -> Any:
    """A model with drawn weights, ready to train with float32 masters."""
    import torch

    from benchmarks.decoder import draw
    from posttrain.compute.engine import Engine, ModelFunctions
    from posttrain.compute.master import Masters
    from posttrain.model.decoder import Decoder
    from posttrain.model.families import decoder_config
    from posttrain.model.float8 import use_float8
    from posttrain.model.forward import forward, loss_sum
    from posttrain.model.optim import adamw
    from posttrain.model.weights import hf_tensors

    with torch.device("meta"):
        model = Decoder(decoder_config(hf_config(case["size"])))
    model = model.to_empty(device=ranks.device)
    draw(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter /= (2 * len(model.layers)) ** 0.5
    masters = Masters(model)
    if case["side"] == "float8":
        use_float8(model)
    if ranks.device.type == "cuda":
        model.compile_blocks()
    return Engine(
        model,
        adamw(masters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0),
        ranks=ranks,
        functions=ModelFunctions(forward=forward, loss_sum=loss_sum, named_weights=hf_tensors),
        lr_scale=lambda step: min(1.0, (step + 1) / 10),
        max_grad_norm=1.0,
        masters=masters,
    )


def flops(size: str, tokens: int, steps: int) -> float:
    """Of the median step's forward and backward, exact."""
    import torch

    from posttrain.model.decoder import Decoder
    from posttrain.model.families import decoder_config
    from posttrain.model.flops import flop_counts

    with torch.device("meta"):
        counts = flop_counts(Decoder(decoder_config(hf_config(size))))
    lengths = [[len(each) - 1 for each in documents(tokens, n, 1000)] for n in range(WARM_UP, steps)]
    return median(counts.step(each, tokens) for each in lengths)


def rows_of(size: str, tokens: int, sides: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of speed and, where there is a curve, one of its last tenth of losses."""
    mine, theirs = sides["float8"], sides["bfloat16"]
    what = f"Qwen3 {size}, T {tokens}, skewed documents, whole steps, float8; baseline: ours in bfloat16"
    seconds, passes = ([median(each[part][WARM_UP:]) for each in (mine, theirs)] for part in ("seconds", "passes"))
    work = flops(size, tokens, len(mine["seconds"]))
    more = {
        "forward_and_backward_ratio": round(passes[1] / passes[0], 3),
        "mfu_of_bfloat16_peak": [round(work / each / PEAK, 4) for each in seconds],
        "peak_gib": [mine["peak_gib"], theirs["peak_gib"]],
        "measured": sides,
    }
    rates = {"ours": tokens / seconds[0], "baseline": tokens / seconds[1]}
    rows = [row("float8", what, **rates, unit="tokens/s", **more)]
    if (last := len(mine["losses"]) // 10) > 1:
        ends = [fmean(each["losses"][-last:]) for each in (mine, theirs)]
        what = f"Qwen3 {size}, T {tokens}, float8: mean loss of the last {last} of {len(mine['losses'])} steps"
        what += f" on a Markov chain of {ENTROPY:.3f} nats a token, from {mine['losses'][0]:.2f}"
        rows.append(row("float8", what, ours=ends[0], baseline=ends[1], unit="nats"))
    return rows


def matmuls(size: str, tokens: int) -> dict[str, Any]:
    """TFLOP/s of the three products of each Linear of a block, stacked as the decoder stacks them, and ms of casts."""
    import torch

    from posttrain.model import float8

    hidden, _, heads, keys, head_dim, mlp, _ = SIZES[size]
    shapes = {"qkv": (hidden, (heads + 2 * keys) * head_dim), "o": (heads * head_dim, hidden)}
    shapes |= {"gate_up": (hidden, 2 * mlp), "down": (mlp, hidden)}
    found: dict[str, Any] = {}
    one = torch.ones((), device="cuda")
    for name, (k, n) in shapes.items():
        products = {"y": (tokens, k, n), "dx": (tokens, n, k), "dw": (n, tokens, k)}
        for product, (rows, inner, columns) in products.items():
            a = torch.randn(rows, inner, device="cuda").bfloat16()
            b = torch.randn(columns, inner, device="cuda").bfloat16()
            a8, b8 = a.to(float8.E4M3 if product == "y" else float8.E5M2), b.to(float8.E4M3)
            runs = {"bfloat16": lambda a=a, b=b: a @ b.t()}
            for fast in (True, False):
                kind = {"dtype": torch.bfloat16, "fast": fast}
                speed = "fast" if fast else "exact"
                runs[f"float8 {speed}"] = lambda a=a8, b=b8, kind=kind: float8.scaled_mm(a, b, one, one, **kind)
            times = {what: median_ms(run, repeat=5, inner=4) for what, run in runs.items()}
            work = 2 * rows * inner * columns
            found[f"{name} {product}"] = {what: round(work / ms / 1e9) for what, ms in times.items()}
        x = torch.randn(tokens, k, device="cuda").bfloat16()
        both = median_ms(lambda x=x: float8.cast([x], one, float8.E4M3, dim=0, layouts=(True, True)), repeat=5, inner=4)
        found[f"{name} cast of x, GB/s"] = round(4 * x.numel() / both / 1e6)
    return found


def sides_of(size: str, options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """What both sides measured at one size; one that failed is named on stderr and left out."""
    sides: dict[str, Any] = {}
    for side in ("bfloat16", "float8"):
        case = {"size": size, "tokens": options.tokens, "side": side, "steps": steps}
        found = in_a_process("benchmarks.float8", case, timeout_s=240.0)
        if isinstance(found, str):
            print(f"{size} {side}: {found}", file=sys.stderr, flush=True)
            continue
        print(json.dumps({"size": size, "side": side, "median_s": median(found["seconds"][WARM_UP:])}), flush=True)
        sides[side] = found
    return sides


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1.7b", "4b"], choices=SIZES)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=60, help="of the first size")
    parser.add_argument("--matmuls", action="store_true")
    parser.add_argument("--case", help="one side, in this process")
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(json.loads(options.case))), flush=True)
        return 0
    if options.matmuls:
        for size in options.sizes:
            for name, numbers in matmuls(size, options.tokens).items():
                print(json.dumps({"size": size, "matmul": name, "tflops": numbers}), flush=True)
        return 0
    rows: list[dict[str, Any]] = []
    failed = False
    for size in options.sizes:
        steps = options.steps if size == options.sizes[0] else WARM_UP + SPEED_STEPS
        sides = sides_of(size, options, steps)
        failed |= len(sides) < 2
        rows += rows_of(size, options.tokens, sides) if len(sides) == 2 else []
        write("float8", rows, options.out)  # after each size: one that is cut off leaves the others
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
