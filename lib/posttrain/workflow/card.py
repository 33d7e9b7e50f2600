"""A run on Metaflow cards: live in training, and one page each for data and evaluation.

Only the task's own process can refresh its card, so the driver observes and the actors do not.
"""

from collections.abc import Sequence
from typing import Any

from metaflow import current
from metaflow.cards import Markdown, ProgressBar, Table, ValueBox, VegaChart

from posttrain.data.types import Rollout
from posttrain.workflow.evaluate import last_user_text

Lines = dict[str, str]
"""Metric name -> label in the legend."""

GRPO_CHARTS: list[tuple[str, str, Lines]] = [
    ("Reward", "mean reward", {"reward/mean": "training rollouts", "eval/reward": "held-out rows"}),
    ("KL to the starting policy", "nats per token", {"policy/kl": "KL (k3)"}),
    ("Entropy", "nats per token", {"policy/entropy": "policy entropy"}),
    ("Completion length", "tokens", {"rollout/tokens_mean": "mean", "rollout/tokens_max": "longest"}),
    ("Loss", "per loss token", {"loss": "policy loss"}),
    ("Trainer vs sampler", "mean |Δ logprob|, nats", {"policy/mismatch_abs": "mismatch"}),
]
SFT_CHARTS: list[tuple[str, str, Lines]] = [
    ("Loss", "nats per loss token", {"loss": "training"}),
    ("Gradient norm", "before clipping", {"policy/grad_norm": "norm", "grad_norm": "norm"}),
]
PHASES = ("rollout", "train", "sync", "eval")
MAX_POINTS = 400
"""Points a chart keeps; longer runs are thinned, since every refresh rewrites the whole chart."""
COLOURS = ["#3b6fd4", "#e4812f", "#3f9c68", "#a2519f"]


class TrainingCard:
    """Observes a run and draws it: progress, latest numbers, curves, where the time goes, sample rollouts.

    `card_id` is the id of the step's @card(type="blank").
    """

    def __init__(self, title: str, facts: Sequence[str], *, num_steps: int, method: str, card_id: str = "training"):
        self.card = _card(card_id)
        self.rows: list[dict[str, float]] = []
        self.specs = GRPO_CHARTS if method == "grpo" else SFT_CHARTS
        self.boxes = _boxes(method)
        self.progress = ProgressBar(max=num_steps, label="Optimizer steps", unit="")
        self.charts = [VegaChart(_lines(*spec, [])) for spec in self.specs]
        self.times = VegaChart(_stacked_time([])) if method == "grpo" else None
        self.samples = Markdown("_none yet_")
        self.card.append(Markdown(f"# {title}\n" + " · ".join(facts)))
        self.card.append(self.progress)
        self.card.append(Table([list(self.boxes.values())]))
        every: list[Any] = [*self.charts, *([self.times] if self.times else [])]
        for start in range(0, len(every), 2):
            self.card.append(Table([every[start : start + 2]]))
        if method == "grpo":
            self.card.append(Markdown("## Sample rollouts of the latest step"))
            self.card.append(self.samples)
        self.card.refresh()

    def restore(self, history: Sequence[dict[str, float]]) -> None:
        self.rows = list(history)
        if self.rows:
            self._draw()

    def step(self, metrics: dict[str, float]) -> None:
        self.rows.append(metrics)
        self._draw()

    def rollouts(self, step: int, groups: Sequence[Sequence[Rollout]]) -> None:
        """The best and the worst completion of four groups."""
        lines = ["| prompt | completion | reward | tokens | ended by |", "|---|---|---|---|---|"]
        for group in groups[:4]:
            ranked = sorted(group, key=lambda rollout: rollout.reward or 0.0)
            for rollout in (ranked[-1], ranked[0]):
                ended = "stop token" if rollout.finish_reason == "stop" else "length limit"
                cells = (
                    _code(last_user_text(rollout.prompt.row)),
                    _code(rollout.text),
                    f"{rollout.reward:g}",
                    str(len(rollout.token_ids)),
                    ended,
                )
                lines.append(f"| {' | '.join(cells)} |")
        self.samples.update(f"Step {step + 1}: best and worst of the first groups.\n\n" + "\n".join(lines))
        self.card.refresh()

    def _draw(self) -> None:
        rows = _thinned(self.rows)
        for chart, spec in zip(self.charts, self.specs, strict=True):
            chart.update(_lines(*spec, rows))
        if self.times:
            self.times.update(_stacked_time(rows))
        for name, box in self.boxes.items():
            latest = next((row[name] for row in reversed(self.rows) if name in row), None)
            if latest is not None:
                box.update(value=f"{latest:,.3f}")
        self.progress.update(int(self.rows[-1]["step"]) + 1)
        self.card.refresh()


def _card(card_id: str) -> Any:
    """The manager of one @card of the running step."""
    return current.card[card_id]  # pyright: ignore[reportAttributeAccessIssue]  (Metaflow adds it at run time)


def _boxes(method: str) -> dict[str, ValueBox]:
    titles = {"loss": "Loss", "grad_norm": "Gradient norm", "time/step_s": "Seconds per step"}
    if method == "grpo":
        titles = {
            "reward/mean": "Training reward",
            "eval/reward": "Held-out reward",
            "policy/kl": "KL to start",
            "rollout/tokens_mean": "Tokens per completion",
            "time/step_s": "Seconds per step",
        }
    return {name: ValueBox(title=title, value="-") for name, title in titles.items()}


def show_data(tokens: dict[str, Any], data: dict[str, Any], *, card_id: str = "data") -> None:
    """The data page: rows, lengths, packing, and one conversation with its trained tokens marked."""
    card = _card(card_id)
    card.append(Markdown("# Data"))
    rows: list[list[Any]] = [
        [name, f"{count:,}", data["sha256"][f"{name}.parquet"][:12]] for name, count in data["rows"].items()
    ]
    card.append(Table(rows, headers=["set", "rows", "sha256"]))
    stats = tokens["stats"]
    demonstrations = stats["demonstrations"]
    if demonstrations:
        card.append(Markdown("## Demonstrations, tokenised"))
        share = demonstrations["loss_tokens"] / demonstrations["tokens"]
        numbers = {
            "Samples": f"{demonstrations['samples']:,}",
            "Tokens": f"{demonstrations['tokens']:,}",
            "Trained tokens": f"{share:.0%}",
            "Predicted fill": f"{demonstrations['predicted_fill']:.1%}",
        }
        card.append(Table([[ValueBox(title=name, value=value) for name, value in numbers.items()]]))
        quantiles = demonstrations["length_quantiles"]
        card.append(Table([[str(v) for v in quantiles.values()]], headers=[f"length {q}" for q in quantiles]))
        card.append(Markdown("## What is trained: the first demonstration, trained tokens in bold"))
        card.append(Markdown(" ".join(_marked(token) for token in tokens["preview"])))
    card.append(Markdown("## Prompts"))
    prompts: list[list[Any]] = [[n, f"{s['prompts']:,}", str(s["longest"])] for n, s in stats["prompts"].items()]
    card.append(Table(prompts, headers=["set", "prompts", "longest, tokens"]))
    card.append(Markdown(f"Tokenizer fingerprint `{tokens['tokenizer_sha256'][:16]}`"))


def show_evaluation(evaluation: dict[str, dict[str, Any]], *, card_id: str = "evaluation") -> None:
    """The evaluation page: every model on the same rows with the same sampling noise, and its answers."""
    card = _card(card_id)
    first = next(iter(evaluation.values()))
    card.append(Markdown(f"# Evaluation on {first['rows']} held-out rows"))
    measures = ("greedy_reward", "sampled_reward", "best_reward", "mean_tokens")
    bars = [
        {"model": name, "measure": measure.removesuffix("_reward"), "reward": found[measure]}
        for name, found in evaluation.items()
        for measure in measures[:3]
    ]
    card.append(VegaChart(_bars(bars, list(evaluation))))
    rows: list[list[Any]] = [[name, *(f"{found[m]:.3f}" for m in measures)] for name, found in evaluation.items()]
    headings = ["model", "reward, greedy", "reward, sampled", f"reward, best of {first['samples']}", "tokens"]
    card.append(Table(rows, headers=headings))
    for name, found in evaluation.items():
        card.append(Markdown(f"## {name}: greedy answers"))
        answers: list[list[Any]] = [[e["prompt"], e["completion"], f"{e['reward']:g}"] for e in found["examples"]]
        card.append(Table(answers, headers=["prompt", "completion", "reward"]))


def _lines(title: str, unit: str, lines: Lines, rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """One chart: a line per metric that occurs, points where it is measured rarely."""
    values = [
        {"step": row["step"] + 1, "value": row[name], "series": label}
        for name, label in lines.items()
        for row in rows
        if name in row
    ]
    encoding: dict[str, Any] = {
        "x": {"field": "step", "type": "quantitative", "title": "optimizer step", "axis": {"tickMinStep": 1}},
        "y": {"field": "value", "type": "quantitative", "title": unit, "scale": {"zero": False}},
        "tooltip": [{"field": f} for f in ("series", "step", "value")],
    }
    if len(lines) > 1:
        scale = {"domain": list(lines.values()), "range": COLOURS}
        encoding["color"] = {"field": "series", "type": "nominal", "title": None, "scale": scale}
        encoding["color"]["legend"] = {"orient": "bottom"}
    return _chart(title, values, {"type": "line", "point": {"size": 18}, "color": COLOURS[0]}, encoding)


def _stacked_time(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Seconds of every phase of a step, and what no phase accounts for."""
    values = []
    for row in rows:
        known = {phase: row.get(f"time/{phase}_s", 0.0) for phase in PHASES}
        known["other"] = max(0.0, row.get("time/step_s", 0.0) - sum(known.values()))
        values += [
            {"step": row["step"] + 1, "seconds": s, "phase": p, "order": i} for i, (p, s) in enumerate(known.items())
        ]
    scale = {"domain": [*PHASES, "other"], "range": [*COLOURS, "#9aa0a6"]}
    encoding = {
        "x": {
            "field": "step",
            "type": "ordinal",
            "title": "optimizer step",
            "axis": {"labelOverlap": True, "labelAngle": 0},
        },
        "y": {"field": "seconds", "type": "quantitative", "title": "seconds", "stack": True},
        "color": {"field": "phase", "type": "nominal", "title": None, "scale": scale, "legend": {"orient": "bottom"}},
        "order": {"field": "order"},
        "tooltip": [{"field": f} for f in ("phase", "step", "seconds")],
    }
    return _chart("Where a step's time goes", values, {"type": "bar"}, encoding)


def _bars(values: list[dict[str, Any]], models: list[str]) -> dict[str, Any]:
    encoding = {
        "x": {"field": "measure", "type": "nominal", "title": None, "sort": None, "axis": {"labelAngle": 0}},
        "xOffset": {"field": "model", "sort": models},
        "y": {"field": "reward", "type": "quantitative", "title": "mean reward", "scale": {"domain": [0, 1]}},
        "color": {
            "field": "model",
            "type": "nominal",
            "title": None,
            "sort": models,
            "scale": {"range": COLOURS[1::-1]},
        },
        "tooltip": [{"field": f} for f in ("model", "measure", "reward")],
    }
    return _chart("Reward before and after", values, {"type": "bar"}, encoding)


def _chart(title: str, values: list[dict[str, Any]], mark: dict[str, Any], encoding: dict[str, Any]) -> dict[str, Any]:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "title": {"text": title, "anchor": "start"},
        "width": 420,
        "height": 220,
        "data": {"values": values},
        "mark": mark,
        "encoding": encoding,
    }


def _thinned(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """At most MAX_POINTS rows: the last, rows with an evaluation, and every k-th."""
    stride = -(-len(rows) // MAX_POINTS)
    return [row for i, row in enumerate(rows) if i % stride == 0 or i == len(rows) - 1 or "eval/reward" in row]


def _code(text: str, limit: int = 200) -> str:
    """Text of a model or a user inside a Markdown table: nothing of it is markup."""
    shown = text if len(text) <= limit else text[:limit] + "…"
    for mark, safe in (("`", "'"), ("|", "¦"), ("\n", "⏎"), ("\r", ""), ("<", "‹"), (">", "›")):
        shown = shown.replace(mark, safe)
    return f"`{shown}`" if shown.strip() else "_empty_"


def _marked(token: dict[str, Any]) -> str:
    return f"**{_code(token['token'])}**" if token["trained"] else _code(token["token"])
