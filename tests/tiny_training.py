"""How the tests train a tiny policy where the numbers themselves do not matter."""

from posttrain.workflow.training import Training

TRAINING = Training(
    num_steps=5,
    lr=1e-2,
    schedule="constant",
    warmup_steps=0,
    betas=(0.9, 0.95),
    weight_decay=0.0,
    max_grad_norm=1.0,
    pack_tokens=64,
)
