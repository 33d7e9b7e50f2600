"""The learning rate over a run, as a factor on its peak: a function of the step alone, so a resume needs no state."""

import math

WSD_DECAY = 0.2
"""Share of the steps over which `wsd` decays; 10 to 20 % reach what a cosine over the run does (arXiv:2405.18392)."""


def lr_scale(step: int, *, schedule: str, warmup_steps: int, num_steps: int) -> float:
    """Factor on the peak learning rate for step 0, 1, …: a linear warm-up, then by `schedule`.

    constant: hold. linear: to zero after the last step. cosine: half a cosine to a tenth of the peak at the last
    step (arXiv:1608.03983, eq. 5, with Chinchilla's floor, arXiv:2203.15556). wsd: hold, then over the last fifth of
    the steps 1 - sqrt(progress) to zero (warm-up-stable-decay, arXiv:2405.18392, eq. 1).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    rest = max(1, num_steps - warmup_steps)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return max(0.0, (num_steps - step) / rest)
        case "cosine":
            progress = min(1.0, (step - warmup_steps) / max(1, rest - 1))
            return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
        case "wsd":
            length = max(1, min(rest, round(WSD_DECAY * num_steps)))
            progress = min(1.0, max(0.0, (step - (num_steps - length)) / length))
            return 1.0 - math.sqrt(progress)
    raise AssertionError(f"unknown schedule {schedule!r}")
