"""The cards of single moments: what the data are, and what the trained model can do."""

from collections.abc import Sequence
from typing import Any

from metaflow.cards import Markdown, VegaChart

from posttrain.workflow import charts, markup
from posttrain.workflow.card import open_card
from posttrain.workflow.data_report import QUANTILES, dropped_facts, report_facts, source_counts, source_state
from posttrain.workflow.evaluation_tables import evaluation_tables
from posttrain.workflow.measures import LABELS, PASS, label_of, measured


def show_data(report: dict[str, Any], data: dict[str, Any], *, card_id: str = "data") -> None:
    """The data page.

    Args:
        report: of the tokenize steps: sources with their counts, prompt sets, one document's tokens, the first packs.
        data: {"rows": {set: count}, "sha256": {file: hex}} of the prompt sets.
    """
    card = open_card(card_id)
    for part in data_page(report, data):
        card.append(VegaChart(part) if isinstance(part, dict) else Markdown(part))
    card.refresh()


def show_evaluation(evaluation: dict[str, dict[str, Any]], *, card_id: str = "evaluation") -> None:
    """The evaluation page: every model on the same rows with the same sampling noise, and its answers."""
    card = open_card(card_id)
    first = next(iter(evaluation.values()))
    asked = "samples" in first
    noise = [f"{first['samples']} samples a row, with the same noise for every model"] if asked else []
    card.append(Markdown(markup.page("Evaluation on held-out rows", [f"{first['rows']:,} rows", *noise])))
    if refused := list(evaluation.values())[-1].get("refused"):
        card.append(Markdown(markup.block(markup.banner("The gate refuses this model", refused))))
    card.append(Markdown(verdict(evaluation)))
    for table in evaluation_tables(evaluation):
        card.append(Markdown(markup.block(markup.heading(table.title), markup.table(table.headings, table.rows))))
    if asked:
        measures = measure_names(first["samples"]) | {n: n for n in measured(evaluation) if n.startswith(PASS)}
        bars = {model: {label: found[name] for name, label in measures.items()} for model, found in evaluation.items()}
        card.append(VegaChart(charts.bar_chart("Reward", "mean reward", bars)))
        card.append(Markdown(answers(evaluation)))
    card.refresh()


def show_promotion(
    promotion: dict[str, Any], evaluation: dict[str, dict[str, Any]], *, card_id: str = "promotion"
) -> None:
    """The promotion page: the challenger beside what it was trained from, how sure the gain is, and the decision.

    Args:
        promotion: what the step promote returned.
    """
    card = open_card(card_id)
    for part in promotion_page(promotion, evaluation):
        card.append(VegaChart(part) if isinstance(part, dict) else Markdown(part))
    card.refresh()


def show_export(exported: dict[str, Any], facts: dict[str, Any], *, card_id: str = "export") -> None:
    """The export page: where the model is, that it is what was trained, which runs and rows made it, its files.

    Args:
        exported: what the step export returned.
        facts: {"files": {name: {"bytes", "sha256"}}, "lineage": one mapping a run, the last one this}.
    """
    card = open_card(card_id)
    for part in export_page(exported, facts):
        card.append(Markdown(part))
    card.refresh()


def export_page(exported: dict[str, Any], facts: dict[str, Any]) -> list[markup.Html]:
    """The export card from top to bottom."""
    files, runs = facts["files"], facts["lineage"]
    weights = [entry["bytes"] for name, entry in files.items() if name.endswith(".safetensors")]
    held, agreed = exported["max_abs_diff"], exported.get("top1_agreement")
    boxes = [
        ("Largest difference", markup.number(float(held)), "of a logit or score, to what transformers opens"),
        *([("Same likeliest token", f"{agreed:.1%}", "of all positions compared")] if agreed is not None else []),
        ("Weights", markup.size(sum(weights)), f"safetensors, {len(weights)} file{'s' * (len(weights) > 1)}"),
        ("Runs that made it", f"{len(runs):,}", f"the last one by {runs[-1]['method']}"),
    ]
    names = {"run": "run", "method": "method", "started_from": "started from", "data_fingerprint": "rows"}
    names |= {"tokens_sha256": "token files", "config_sha256": "config", "tokenizer_sha256": "tokenizer"}
    lineage = [[_short_hash(name, run.get(name)) for name in names] for run in runs]
    table = [[name, markup.size(each["bytes"]), each["sha256"][:16]] for name, each in sorted(files.items())]
    where = markup.lines([markup.said(exported["uri"]), markup.said(f"posttrain lineage {exported['uri']}")])
    return [
        markup.page("Exported model", [runs[-1]["run"], f"{len(files):,} files"]),
        markup.block(markup.boxes(boxes)),
        markup.block(markup.heading("Where it is", "And from there back to its rows."), where),
        markup.block(
            markup.heading("Lineage", "The first run first; rows, token files and config by their sha256."),
            markup.table(list(names.values()), lineage),
        ),
        markup.block(markup.heading("Files"), markup.table(["file", "size", "sha256"], table)),
    ]


def _short_hash(name: str, value: str | None) -> str:
    """Enough of a hash to tell it from others."""
    return "" if value is None else value[:12] if name.endswith(("sha256", "fingerprint")) else value


def promotion_page(
    promotion: dict[str, Any], evaluation: dict[str, dict[str, Any]]
) -> list[markup.Html | dict[str, Any]]:
    """The promotion card from top to bottom."""
    found, parent = promotion["comparison"], promotion["parent"]
    was = "the first model" if parent is None else f"champion, version {parent}"
    title = {
        "promoted": f"Promoted as version {promotion['version']}",
        "kept": "Not promoted" if parent is None else f"Version {parent} stays champion",
        "stale": "Too late to be promoted",
    }[promotion["outcome"]]
    new = f"{promotion['files']:,} new file{'s' * (promotion['files'] != 1)}"
    facts = [promotion["run"], new, f"{found['rows']:,} held-out rows", f"from {was}"]
    sure = f"{found['confidence']:.0%}"
    boxes = [
        ("Gain of the mean", f"{found['gain']:+.4g}", f"of {LABELS[promotion['measure']]}"),
        (f"Above, {sure} sure", f"{found['low']:+.4g}", f"must be above {found['margin']:g}"),
        (f"Below, {sure} sure", f"{found['high']:+.4g}", "paired bootstrap over rows"),
    ]
    before, after = evaluation["before"], evaluation["after"]
    rows = [[label_of(name), before[name], after[name], after[name] - before[name]] for name in measured(evaluation)]
    interval = (found["low"], found["high"])
    return [
        markup.page(title, facts),
        markup.block(markup.heading("Decision", promotion["why"]), markup.boxes(boxes)),
        charts.interval_chart(
            f"Mean gain, and where it lies for {sure} sure",
            f"gain of {LABELS[promotion['measure']]}",
            found["gain"],
            interval,
            found["margin"],
        ),
        markup.block(markup.heading("Both models"), markup.table(["", was, "challenger", "change"], rows)),
    ]


def data_page(report: dict[str, Any], data: dict[str, Any]) -> list[markup.Html | dict[str, Any]]:
    """The data card from top to bottom: text, and the spec of its chart. Without sources only the prompt sets."""
    head, sets = markup.page("Data", report_facts(report)), sets_table(report["prompts"], data)
    sources = report["sources"]
    if not sources:
        return [head, sets]
    parts: list[markup.Html | dict[str, Any]] = [head, totals(report), sources_table(sources)]
    lengths = {source["name"]: source["lengths"] for source in sources}
    chart = charts.length_chart("Lengths of units", lengths, report["pack_tokens"])
    parts += [chart] if chart else []
    parts.append(quantiles_table(sources))
    if report["packs"]:
        parts.append(packed_rows(report))
    if report["preview"]:
        note = "What the model is asked to predict; the blue tokens make the loss."
        title = markup.heading("One document, token by token", note)
        parts.append(markup.block(title, markup.tokens(report["preview"])))
    return [*parts, sets]


def sets_table(prompts: dict[str, Any], data: dict[str, Any]) -> markup.Html:
    """One line a prompt set: rows, tokens, the longest row, and the fingerprint of its file."""
    rows: list[list[Any]] = []
    for name, count in data["rows"].items():
        found = prompts.get(name)
        total, longest = (found["tokens"], found["longest"]) if found else ("", "")
        fingerprint = markup.said(data["sha256"][f"{name}.parquet"][:16])
        rows.append([name.replace("_", " "), count, total, longest, fingerprint])
    headings = ["set", "rows", "tokens", "longest row, tokens", "sha256 of its file"]
    return markup.block(markup.heading("Prompt sets"), markup.table(headings, rows))


def totals(report: dict[str, Any]) -> markup.Html:
    """The sources together, and how well their units pack."""
    units, tokens, trained = (sum(s[name] for s in report["sources"]) for name in ("units", "tokens", "loss_tokens"))
    found = [("Units", f"{units:,}", "documents or pairs"), ("Tokens", f"{tokens:,}", f"in {report['scope']}")]
    if tokens:
        found.append(("Trained", f"{trained / tokens:.1%}", f"{trained:,.0f} tokens"))
    if report["predicted_fill"] is not None:
        fill = f"{report['predicted_fill']:.1%}"
        found.append(("Packs are filled to", fill, f"of {report['pack_tokens']:,} tokens, predicted"))
    return markup.block(markup.boxes(found))


def sources_table(sources: Sequence[dict[str, Any]]) -> markup.Html:
    """What every source is and gave; how it is drawn and how sound it is; the first rows that were dropped."""
    given: list[list[Any]] = []
    state: list[list[Any]] = []
    for source in sources:
        kind = f"{source['format'] or 'format by columns'}, {source['fingerprint'][:16]}"
        what = markup.lines([source["name"], markup.said(source["path"]), kind])
        given.append([what, *source_counts(source).values()])
        dropped = markup.lines(dropped_facts(source)) or "none"
        state.append([source["name"], *source_state(source).values(), dropped])
    tables = [
        markup.table(["source", *source_counts(sources[0])], given),
        markup.table(["source", *source_state(sources[0]), "dropped rows"], state),
    ]
    examples = [markup.said(example) for source in sources for example in source["examples"]]
    shown = [markup.heading("Dropped rows", "The first of every source."), markup.lines(examples)] if examples else []
    return markup.block(markup.heading("Sources"), *tables, *shown)


def quantiles_table(sources: Sequence[dict[str, Any]]) -> markup.Html:
    """How long the units of every source are."""
    rows = [[source["name"], *(source["quantiles"].get(name, "") for name in QUANTILES)] for source in sources]
    return markup.block(markup.table(["tokens of a unit", *QUANTILES.values()], rows))


def packed_rows(report: dict[str, Any]) -> markup.Html:
    """The first packs, drawn to scale."""
    colours = [charts.source_colour(i) for i in range(len(report["sources"]))]
    names = zip((source["name"] for source in report["sources"]), colours, strict=True)
    note = "Every strip is what one forward pass reads; trained tokens are drawn at the end of their document."
    pale = markup.Html(f'<span class="key untrained" style="background:{colours[0]}"></span>paler: read only')
    empty = markup.Html('<span class="key empty"></span>empty')
    key = markup.legend(names, pale, empty)
    strips = markup.packs(report["packs"], report["pack_tokens"], colours)
    return markup.block(markup.heading("The first packs", note), key, strips)


def measure_names(samples: int) -> dict[str, str]:
    """Key of a model's evaluation -> its name for people."""
    return {
        "greedy_reward": "greedy",
        "sampled_reward": f"mean of {samples} samples",
        "best_reward": f"best of {samples} samples",
    }


def verdict(evaluation: dict[str, dict[str, Any]]) -> markup.Html:
    """The last model's numbers, with the first model's below them; pass@k are in the chart alone."""
    (before, was), (_, now) = next(iter(evaluation.items())), list(evaluation.items())[-1]
    labels = {name: label_of(name) for name in measured(evaluation)}
    titles = {name: label[0].upper() + label[1:] for name, label in labels.items()}
    if "samples" in now:
        titles |= {name: f"Reward, {label}" for name, label in measure_names(now["samples"]).items()}
    titles["mean_tokens"] = "Tokens a completion"
    found = []
    for name in measured(evaluation):
        if name.startswith(PASS):
            continue
        change = f"{before} {markup.number(was[name])}, change {now[name] - was[name]:+.3f}"
        found.append((titles[name], markup.number(now[name]), change if len(evaluation) > 1 else ""))
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
