"""The cards of single moments: what the data are, and what the trained model can do."""

from typing import Any

from metaflow.cards import Markdown, VegaChart

from posttrain.workflow import charts, markup
from posttrain.workflow.card import open_card


def show_data(tokens: dict[str, Any], data: dict[str, Any], *, card_id: str = "data") -> None:
    """The data page: rows, lengths, packing, and one conversation with its trained tokens marked."""
    card = open_card(card_id)
    card.append(Markdown(markup.page("Data", [f"tokenizer {tokens['tokenizer_sha256'][:16]}"])))
    card.append(Markdown(sets_table(tokens["stats"], data)))
    if tokens["stats"]["demonstrations"]:
        card.append(Markdown(demonstrations(tokens["stats"]["demonstrations"], tokens["preview"])))
    card.refresh()


def show_evaluation(evaluation: dict[str, dict[str, Any]], *, card_id: str = "evaluation") -> None:
    """The evaluation page: every model on the same rows with the same sampling noise, and its answers."""
    card = open_card(card_id)
    first = next(iter(evaluation.values()))
    facts = [f"{first['rows']:,} rows", f"{first['samples']} samples a row, with the same noise for every model"]
    card.append(Markdown(markup.page("Evaluation on held-out rows", facts)))
    card.append(Markdown(verdict(evaluation)))
    measures = measure_names(first["samples"])
    bars = {model: {label: found[name] for name, label in measures.items()} for model, found in evaluation.items()}
    card.append(VegaChart(charts.bar_chart("Reward", "mean reward", bars)))
    card.append(Markdown(answers(evaluation)))
    card.refresh()


def sets_table(stats: dict[str, Any], data: dict[str, Any]) -> markup.Html:
    """One line a set: rows, tokens, the longest row, and the fingerprint of its file."""
    rows: list[list[Any]] = []
    for name, count in data["rows"].items():
        prompts, demos = stats["prompts"].get(name), stats["demonstrations"]
        total, longest = (prompts["tokens"], prompts["longest"]) if prompts else ("", "")
        if not prompts and demos:
            total, longest = demos["tokens"], demos["length_quantiles"]["p100"]
        rows.append(
            [name.replace("_", " "), count, total, longest, markup.said(data["sha256"][f"{name}.parquet"][:16])]
        )
    headings = ["set", "rows", "tokens", "longest row, tokens", "sha256 of its file"]
    return markup.block(markup.table(headings, rows))


def demonstrations(stats: dict[str, Any], preview: list[dict[str, Any]]) -> markup.Html:
    """How long demonstrations are, how well they pack, and which of their tokens are trained."""
    lengths = stats["length_quantiles"]
    found = [
        ("Demonstrations", f"{stats['samples']:,}", f"{stats['tokens']:,} tokens"),
        ("Trained tokens", f"{stats['loss_tokens'] / stats['tokens']:.0%}", f"{stats['loss_tokens']:,} tokens"),
        ("Median length", f"{lengths['p50']:,}", f"{lengths['p0']:,} to {lengths['p100']:,} tokens"),
        ("99 % are at most", f"{lengths['p99']:,}", "tokens long"),
        ("Packs are filled to", f"{stats['predicted_fill']:.1%}", f"of {stats['pack_tokens']:,} tokens"),
    ]
    title = markup.heading(
        "The first demonstration, token by token", "What the model is asked to predict; the blue tokens make the loss."
    )
    return markup.block(markup.boxes(found), title, markup.tokens(preview))


def measure_names(samples: int) -> dict[str, str]:
    """Key of a model's evaluation -> its name for people."""
    return {
        "greedy_reward": "greedy",
        "sampled_reward": f"mean of {samples} samples",
        "best_reward": f"best of {samples} samples",
    }


def verdict(evaluation: dict[str, dict[str, Any]]) -> markup.Html:
    """The last model's numbers, with the first model's below them."""
    (before, was), (_, now) = next(iter(evaluation.items())), list(evaluation.items())[-1]
    titles = {name: f"Reward, {label}" for name, label in measure_names(now["samples"]).items()}
    titles["mean_tokens"] = "Tokens a completion"
    found = []
    for name, title in titles.items():
        change = f"{before} {markup.number(was[name])}, change {now[name] - was[name]:+.3f}"
        found.append((title, markup.number(now[name]), change if len(evaluation) > 1 else ""))
    return markup.block(markup.boxes(found))


def answers(evaluation: dict[str, dict[str, Any]]) -> markup.Html:
    """Greedy answers of all models to the same prompts, side by side."""
    headings, rows = ["prompt"], []
    for model in evaluation:
        headings += [f"{model}: answer", "reward"]
    for examples in zip(*(found["examples"] for found in evaluation.values()), strict=True):
        row: list[Any] = [markup.said(examples[0]["prompt"])]
        for example in examples:
            row += [markup.said(example["completion"]), example["reward"]]
        rows.append(row)
    return markup.block(markup.heading("Greedy answers"), markup.table(headings, rows))
