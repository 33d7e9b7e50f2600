"""The LM head with cross-entropy, forward and backward: ours beside its bare matmuls, torch, Liger and the naive form.

8192 loss rows over a vocabulary of 151,936 in bfloat16. The bare matmuls are the three that any head must
do, at full size and without a loss: the floor. Extra memory is the peak over inputs and gradients. The
cliff rows run the same head over one token more, with the matrix padded to a multiple of 64 and without.

    python -m benchmarks.lm_head [--out FILE]
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.report import median_ms, row, write
from posttrain.model.head import Head, row_loss

ROWS, VOCAB = 8192, 151_936
GIB = 2**30


def inputs(d: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [ROWS, d], the head [vocab, d], both leaves, and targets [ROWS]."""
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, d, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocab, d, device="cuda") * 0.02).bfloat16().requires_grad_()
    return hidden, weight, torch.randint(0, VOCAB, (ROWS,), device="cuda")


def ours(hidden, weight, targets, vocab: int) -> torch.Tensor:
    head = Head(vocab_size=vocab)
    return row_loss(hidden, weight, targets[:, None], head, lambda rows, lp, _: -lp.sum() / ROWS)


def naive(hidden, weight, targets, vocab: int) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets)


def torch_linear(hidden, weight, targets, vocab: int) -> torch.Tensor:
    return F.linear_cross_entropy(hidden, weight, targets)


def liger() -> Callable[..., torch.Tensor] | None:
    """Liger's fused head, where it is installed."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    fused = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, targets, vocab: fused(weight, hidden, targets)


def measure(form: Callable[..., torch.Tensor], d: int, width: int, vocab: int) -> dict[str, float]:
    """Median ms of forward and backward, extra peak memory in GiB, and the loss and gradient's size, to compare."""
    hidden, weight, targets = inputs(d, width)
    gradient_bytes = hidden.numel() * 2 + weight.numel() * 2

    def step() -> torch.Tensor:
        hidden.grad = weight.grad = None
        loss = form(hidden, weight, targets, vocab)
        loss.backward()
        return loss

    loss = step()
    torch.cuda.synchronize()
    hidden.grad = weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    extra = (torch.cuda.max_memory_allocated() - before - gradient_bytes) / GIB
    found = {"ms": median_ms(step), "extra_gib": extra, "loss": float(loss.detach())}
    return found | {
        "weight_grad": float(weight.grad.double().norm()),
        "hidden_grad": float(hidden.grad.double().norm()),
    }


def bare(d: int) -> float:
    """Median ms of the three matmuls alone, with one full [ROWS, VOCAB] buffer."""
    hidden, weight, _ = inputs(d, VOCAB)
    hidden, weight = hidden.detach(), weight.detach()
    logits = torch.randn(ROWS, VOCAB, device="cuda", dtype=torch.bfloat16)
    parts = (lambda: hidden @ weight.T, lambda: logits @ weight, lambda: logits.T @ hidden)
    return sum(median_ms(part) for part in parts)


def attempt(form: Callable[..., torch.Tensor] | None, *where: int) -> dict[str, Any] | None:
    """measure(), or None where a form is missing or does not fit."""
    if form is None:
        return None
    torch.cuda.empty_cache()
    try:
        return measure(form, *where)
    except torch.OutOfMemoryError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    rows = []
    torch_form = torch_linear if hasattr(F, "linear_cross_entropy") else None
    for d in (1024, 2048, 4096):
        floor = bare(d)
        torch.cuda.empty_cache()
        mine = measure(ours, d, VOCAB, VOCAB)
        peers = {"naive": attempt(naive, d, VOCAB, VOCAB), "liger": attempt(liger(), d, VOCAB, VOCAB)}
        peers["torch_linear_cross_entropy"] = attempt(torch_form, d, VOCAB, VOCAB)
        workload = f"{ROWS} rows, V {VOCAB}, d {d}, bfloat16, cross-entropy forward + backward; baseline: bare matmuls"
        rows.append(row("lm_head", workload, ours=mine["ms"], baseline=floor, unit="ms", measured=mine, peers=peers))
    odd = VOCAB + 1
    padded = -(-odd // 64) * 64
    for d in (2048,):
        cliff, mine = attempt(ours, d, odd, odd), measure(ours, d, padded, odd)
        workload = (
            f"{ROWS} rows, V {odd}, d {d}, bfloat16, rows padded to {padded}; baseline: the same head, not padded"
        )
        if cliff is not None:
            rows.append(
                row("lm_head_padding", workload, ours=mine["ms"], baseline=cliff["ms"], unit="ms", measured=mine)
            )
    write("lm_head", rows, parser.parse_args().out)


if __name__ == "__main__":
    main()
