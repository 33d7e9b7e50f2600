"""The last word of a run: a table of before and after, and where the model is."""

from typing import Any

from posttrain.workflow.evaluation_tables import evaluation_tables
from posttrain.workflow.measures import label_of, measured


def report(*, evaluation: dict[str, dict[str, Any]], before: str, after: str, export_uri: str) -> dict[str, Any]:
    """Print the comparison and return it as rows of measure, before, after, change."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    old, new = evaluation[before], evaluation[after]
    title = f"Held-out rows: {new['rows']}" + (f", k = {new['samples']}" if "samples" in new else "")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("measure")  # a line that began with spaces would lose them: Metaflow strips what a task prints
    for heading in (before, after, "change"):
        table.add_column(heading, justify="right")
    rows = []
    for name in measured(evaluation):
        change = round(new[name] - old[name], 4)
        rows.append({"measure": name, "before": old[name], "after": new[name], "change": change})
        table.add_row(label_of(name), f"{old[name]:.3f}", f"{new[name]:.3f}", f"{change:+.3f}")
    console = Console(width=100)
    console.print(table)
    for more in evaluation_tables(evaluation):
        shown = Table(title=more.title, title_justify="left", box=SIMPLE_HEAD)
        for number, heading in enumerate(more.headings):
            shown.add_column(heading, justify="right" if number else "left")
        for row in more.rows:
            shown.add_row(*map(str, row))
        console.print(shown)
    print(f"exported model: {export_uri}", flush=True)
    gains = [row["change"] for row in rows if row["measure"] == "sampled_reward"]
    return {"rows": rows, **({"sampled_reward_gain": gains[0]} if gains else {})}
