"""The last word of a run: a table of before and after, and where the model is."""

from typing import Any

MEASURES = {
    "greedy_reward": "reward, greedy",
    "sampled_reward": "reward, sampled",
    "best_reward": "reward, best of k",
    "mean_tokens": "tokens per completion",
}


def report(*, evaluation: dict[str, dict[str, Any]], before: str, after: str, export_uri: str) -> dict[str, Any]:
    """Print the comparison and return it as rows of measure, before, after, change."""
    from rich.console import Console
    from rich.table import Table

    old, new = evaluation[before], evaluation[after]
    table = Table(title=f"Held-out rows: {new['rows']}, k = {new['samples']}")
    for heading in ("", before, after, "change"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = []
    for name, label in MEASURES.items():
        change = round(new[name] - old[name], 4)
        rows.append({"measure": name, "before": old[name], "after": new[name], "change": change})
        table.add_row(label, f"{old[name]:.3f}", f"{new[name]:.3f}", f"{change:+.3f}")
    console = Console(width=100)
    console.print(table)
    print(f"exported model: {export_uri}", flush=True)
    return {"rows": rows, "sampled_reward_gain": round(new["sampled_reward"] - old["sampled_reward"], 4)}
