"""The live training card: progress, latest numbers, curves, where the time goes, sample rollouts.

Only the task's own process can refresh its card, so the driver observes and the actors
do not. Charts are Vega specs (charts.py), text is escaped HTML (markup.py).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from metaflow import current
from metaflow.cards import Markdown, VegaChart

from posttrain.data.types import Rollout
from posttrain.workflow import charts, markup
from posttrain.workflow.charts import GREEN, ORANGE, PALE, PURPLE, Chart, Line, Metrics
from posttrain.workflow.rollout_table import RolloutSample
from posttrain.workflow.rollouts import DroppedGroup

REDRAW_SECONDS = 1.0
"""Drawing takes milliseconds; Metaflow sends what was drawn last, every 5 s at most, in a process of its own."""
TABLE_SECONDS = 10.0
"""Between two new tables of rollouts: who pages through one begins anew with the next."""


@dataclass(frozen=True, slots=True)
class View:
    """What a card shows of one kind of training; a chart or box whose metrics never come is left out."""

    boxes: dict[str, str]
    """Metric -> title of its value box."""
    charts: tuple[Chart, ...]
    """The first one takes the full width."""
    phases: dict[str, str]
    """time/{phase}_s -> colour."""


TRAINED = {
    "prepare": "#c9d8f5",
    "forward": PALE,
    "backward": charts.BLUE,
    "reduce": "#1d4690",
    "optimizer": "#5b4fc4",
    "dispatch": "#d3d7dd",
}
"""The phases of an optimizer step, for both views."""
RANKS = Chart(
    "How even the ranks are",
    "largest over mean",
    (Line("perf/imbalance", "seconds taken"), Line("data/imbalance", "FLOPs dealt", ORANGE)),
    scale="data",
)
GRPO = View(
    boxes={
        "eval/reward": "Held-out reward",
        "reward/mean": "Training reward",
        "policy/kl": "KL to the start, nats",
        "policy/entropy": "Entropy, nats",
        "rollout/tokens_mean": "Tokens a completion",
        "reward/groups_without_signal": "Share without signal",
    },
    charts=(
        Chart(
            "Reward",
            "mean reward",
            (
                Line("reward/mean", "training", PALE),
                Line("reward/mean", "mean of 10 steps", mean_of=10),
                Line("eval/reward", "held-out", ORANGE, dots=True),
            ),
            scale="share",
            height=330,
        ),
        Chart("KL to the starting policy", "nats per token", (Line("policy/kl", "KL"),)),
        Chart("Entropy", "nats per token", (Line("policy/entropy", "entropy"),)),
        Chart(
            "Completion length",
            "tokens",
            (Line("rollout/tokens_max", "longest", PALE), Line("rollout/tokens_mean", "mean")),
        ),
        Chart(
            "What does not train",
            "share",
            (
                Line("reward/groups_without_signal", "no-signal groups"),
                Line("rollout/truncated", "truncated", ORANGE),
                Line("policy/importance_clipped", "clipped tokens", PURPLE),
            ),
            scale="share",
        ),
        Chart("Policy loss", "per trained token", (Line("loss", "loss"),), scale="data"),
        Chart("Gradient norm", "before clipping", (Line("policy/grad_norm", "norm"),)),
        Chart("KL to the teacher", "nats per token", (Line("policy/teacher_kl", "KL"),)),
        Chart(
            "Critic", "share of the returns' variance", (Line("value/explained_variance", "explained"),), scale="data"
        ),
        Chart("Trainer against sampler", "mean |Δ logprob|, nats", (Line("policy/mismatch_abs", "mismatch"),)),
        RANKS,
    ),
    phases={
        "generate": GREEN,
        "reward": charts.YELLOW,
        **TRAINED,
        "sync": PURPLE,
        "eval": ORANGE,
        "checkpoint": charts.RED,
    },
)
SFT = View(
    boxes={
        "loss": "Loss, nats per token",
        "entropy": "Entropy, nats",
        "grad_norm": "Gradient norm",
        "lr": "Learning rate",
        "perf/tokens_per_s": "Tokens per second",
        "perf/mfu": "MFU, exact",
    },
    charts=(
        Chart("Loss", "nats per trained token", (Line("loss", "loss"),), height=330),
        Chart("Entropy", "nats per token", (Line("entropy", "entropy"),)),
        Chart("Gradient norm", "before clipping", (Line("grad_norm", "norm"),)),
        Chart("Learning rate", "per step", (Line("lr", "rate"),)),
        RANKS,
    ),
    phases={"data_wait": charts.YELLOW, **TRAINED, "checkpoint": charts.RED},
)
REWARD_STATS = {"reward/mean", "reward/group_std", "reward/groups_without_signal"}


class TrainingCard:
    """Observes a run and draws it. `card_id` is the id of the step's @card(type="blank").

    Charts appear with their first value.
    """

    def __init__(
        self,
        title: str,
        facts: Sequence[str],
        *,
        num_steps: int,
        view: View,
        rollouts_uri: str = "",
        card_id: str = "training",
    ):
        """
        Args:
            rollouts_uri: folder of all rollouts, where the run makes any.
        """
        self.card, self.view, self.num_steps = open_card(card_id), view, num_steps
        self.rows: list[Metrics] = []
        self.charts: dict[str, VegaChart] = {}
        self.drawn_at = 0.0
        self.status = Markdown(markup.block(markup.progress(0, num_steps, "waiting for the first step")))
        self.noted, self.notes = Markdown(""), []
        self.sample, self.browser, self.sampled_at = RolloutSample(rollouts_uri), Markdown(""), 0.0
        self.card.append(Markdown(markup.page(title, facts)))
        self.card.append(self.status)
        self.card.append(self.noted)
        self.card.refresh()

    def restore(self, history: Sequence[Metrics]) -> None:
        self.rows = list(history)
        if self.rows:
            self._draw()

    def step(self, metrics: Metrics) -> None:
        self.rows.append(metrics)
        if time.monotonic() - self.drawn_at >= REDRAW_SECONDS or metrics["step"] + 1 >= self.num_steps:
            self._draw()

    def rollouts(self, step: int, groups: Sequence[Sequence[Rollout]], dropped: Sequence[DroppedGroup] = ()) -> None:
        """Take a sample of them, and show it now and then."""
        self.sample.add(step, groups, dropped)
        if time.monotonic() - self.sampled_at >= TABLE_SECONDS or step + 1 >= self.num_steps:
            self.browser.update(self.sample.table())
            self.card.refresh()
            self.sampled_at = time.monotonic()

    def note(self, text: str) -> None:
        """Keep a note below the progress bar."""
        self.notes.append(text)
        self.noted.update(markup.block(markup.lines(self.notes)))
        self.card.refresh()

    def _draw(self) -> None:
        self.status.update(status(self.rows, self.view.boxes, self.num_steps))
        specs = {chart.title: charts.line_chart(chart, self.rows) for chart in all_charts(self.view, self.rows)}
        specs["time"] = charts.time_chart(self.rows, self.view.phases)
        first = not self.charts
        for title, spec in specs.items():
            if spec and title in self.charts:
                self.charts[title].update(spec)
            elif spec:
                self.charts[title] = VegaChart(spec)
                self.card.append(self.charts[title])
        if first:
            self.card.append(self.browser)
        self.card.refresh()
        self.drawn_at = time.monotonic()


def open_card(card_id: str) -> Any:
    """The manager of one @card of the running step."""
    return current.card[card_id]  # pyright: ignore[reportAttributeAccessIssue]  (Metaflow adds it at run time)


def all_charts(view: View, rows: Sequence[Metrics]) -> list[Chart]:
    """The view's charts, and one for the first named parts of the reward when it has any."""
    parts = sorted({name for name in rows[-1] if name.startswith("reward/")} - REWARD_STATS)
    lines = [Line(name, name.removeprefix("reward/"), c) for name, c in zip(parts, charts.COLOURS, strict=False)]
    if not lines:
        return list(view.charts)
    unit = "mean" if len(lines) > 1 else f"mean of {lines[0].label}"
    return [*view.charts, Chart("Parts of the reward", unit, tuple(lines), scale="share")]


def status(rows: Sequence[Metrics], titles: dict[str, str], num_steps: int) -> markup.Html:
    """Progress with its pace, and a box with the latest and the first value of every metric."""
    done = int(rows[-1]["step"]) + 1
    seconds = [row["time/step_s"] for row in rows if "time/step_s" in row]
    pace = median(seconds[-20:]) if seconds else 0.0
    note = f"{pace:.3g} s a step · {markup.duration(sum(seconds))} in all · "
    note += "finished" if done >= num_steps else f"about {markup.duration(pace * (num_steps - done))} left"
    found = []
    for name, title in titles.items():
        values = [(int(row["step"]) + 1, row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
        if values:
            (first, start), (last, latest) = values[0], values[-1]
            since = f"{markup.number(start)} at step {first:,}" if last > first else f"at step {first:,}"
            found.append((title, markup.number(latest), since))
    return markup.block(markup.progress(done, num_steps, note), markup.boxes(found))
