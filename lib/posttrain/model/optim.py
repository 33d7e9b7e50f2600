"""AdamW with decay on matrices only, and the learning-rate schedule."""

from torch import nn
from torch.optim import AdamW


def adamw(model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float) -> AdamW:
    """AdamW (arXiv:1711.05101) over two groups: matrices decay, norms and other vectors do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=lr, betas=betas, fused=True)


def lr_scale(step: int, *, schedule: str, warmup_steps: int, num_steps: int) -> float:
    """Factor on the peak learning rate for step 0, 1, …: linear warm-up, then constant or linear to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    assert schedule == "linear", f"unknown schedule {schedule!r}"
    return max(0.0, (num_steps - step) / max(1, num_steps - warmup_steps))
