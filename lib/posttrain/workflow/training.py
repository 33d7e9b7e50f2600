"""How a policy is trained, as every rank is told."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a policy is trained: the numbers of the optimizer and its schedule."""

    num_steps: int
    lr: float
    schedule: str
    warmup_steps: int
    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float
    pack_tokens: int
    precision: str = "auto"
    """float32; bfloat16: that of the model's computing, beside float32 masters (compute/master.py);
    bfloat16_stochastic: of all (StochasticAdamW); float8 for bfloat16 in either: that of the blocks' linear layers
    (model/float8.py); auto: bfloat16 on a GPU, float32 on a CPU."""
    activation_checkpointing: str = "none"
    """A mode of model/recompute.py."""
    deterministic: bool = False
    """See compute/device.py."""
