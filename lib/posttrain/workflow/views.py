"""What the card of each recipe on rows shows."""

from dataclasses import replace

from posttrain.workflow import card, charts
from posttrain.workflow.card import View
from posttrain.workflow.charts import ORANGE, Chart, Line

_PHASES = card.SFT.phases | {"eval": ORANGE}


def _both(title: str, unit: str, metric: str, *, height: int = 260) -> Chart:
    """One metric of the training packs and of the held-out rows."""
    lines = (Line(metric, "training"), Line(f"eval/{metric}", "held-out rows", ORANGE, dots=True))
    return Chart(title, unit, lines, height=height)


_TRAINING = card.SFT.charts[2:]
"""Gradient norm and learning rate."""

SFT = replace(
    card.SFT,
    boxes={"eval/loss": "Held-out loss"} | card.SFT.boxes,
    charts=(_both("Loss", "nats per trained token", "loss", height=330), *card.SFT.charts[1:]),
    phases=_PHASES,
)

DPO = View(
    boxes={
        "eval/accuracy": "Held-out accuracy",
        "accuracy": "Training accuracy",
        "loss": "Loss, per pair",
        "margin": "Reward margin",
        "grad_norm": "Gradient norm",
        "perf/tokens_per_s": "Tokens per second",
    },
    charts=(
        _both("Accuracy", "share of pairs", "accuracy", height=330),
        _both("Loss", "per pair", "loss"),
        Chart(
            "Implicit rewards",
            "beta nats",
            (Line("chosen_reward", "chosen", charts.GREEN), Line("rejected_reward", "rejected", charts.RED)),
            scale="data",
        ),
        Chart(
            "Logprobs",
            "nats per answer",
            (Line("chosen_logprob", "chosen", charts.GREEN), Line("rejected_logprob", "rejected", charts.RED)),
            scale="data",
        ),
        *_TRAINING,
    ),
    phases=_PHASES,
)

REWARD = View(
    boxes={
        "eval/accuracy": "Held-out accuracy",
        "accuracy": "Training accuracy",
        "loss": "Loss",
        "margin": "Score margin",
        "grad_norm": "Gradient norm",
        "perf/tokens_per_s": "Tokens per second",
    },
    charts=(
        _both("Accuracy", "share", "accuracy", height=330),
        _both("Loss", "per pair or answer", "loss"),
        Chart(
            "Scores",
            "mean score",
            (Line("chosen_score", "chosen", charts.GREEN), Line("rejected_score", "rejected", charts.RED)),
            scale="data",
        ),
        *_TRAINING,
    ),
    phases=_PHASES,
)

DISTILL = View(
    boxes={
        "eval/loss": "Held-out divergence",
        "loss": "Divergence",
        "grad_norm": "Gradient norm",
        "lr": "Learning rate",
        "perf/tokens_per_s": "Tokens per second",
    },
    charts=(_both("Divergence from the teacher", "nats per trained token", "loss", height=330), *_TRAINING),
    phases=_PHASES,
)
