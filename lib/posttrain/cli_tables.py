"""What commands found, as a person reads it in a terminal; their --json prints the same facts for a program."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from posttrain.terminal_table import print_table


def print_audit(proved: dict[str, Any]) -> None:
    """What `posttrain audit` proved, a line for each stage."""
    table = Table(*("stage", "steps", "draws trained", "dropped", "checkpoint", "replayed"), box=SIMPLE_HEAD)
    for stage, facts in proved["stages"].items():
        dropped = "\n".join(f"{count:,} {reason}" for reason, count in facts["dropped"].items())
        newest = "-" if facts["checkpoint"] is None else f"step {facts['checkpoint']:,}"
        replayed = f"{facts['replayed']:,} steps" if facts["replayed"] else "-"
        numbers = (f"{facts['steps']:,}", f"{facts['draws']:,}", escape(dropped or "none"))
        table.add_row(escape(stage), *numbers, newest, replayed)
    console = Console(highlight=False)
    console.print(f"{proved['root']}: every draw is accounted for", markup=False, soft_wrap=True)
    print_table(console, table)
    for stage, found in proved["differs"].items():
        line = f"{stage}: step {found['step']} is the first that differs, in its {found['what']}"
        console.print(line, markup=False, soft_wrap=True)
    if proved["equal"]:
        console.print(f"equal to {proved['other']}, step by step", markup=False, soft_wrap=True)


def print_verified(found: dict[str, Any], names: list[str]) -> None:
    """What `posttrain verify` found, a table for each peer."""
    weights = "its own weights" if found["weights"] == "folder" else "random weights in a small shape"
    line = f"{found['path']}: {found['family']}, {found['tensors']} tensors, {weights}, seeds: {found['seeds']}"
    console = Console(highlight=False)
    console.print(line, markup=False, soft_wrap=True)
    for name in names:
        said = "The largest differences of all seeds and what is allowed: of logits, and of gradients by their norm."
        console.print(f"\n[bold]Agrees with {name}[/bold]  {said}")
        table = Table(box=SIMPLE_HEAD)
        table.add_column("measure")
        table.add_column("value", justify="right")
        for key, value in found[name].items():
            table.add_row(key, f"{value:.4f}" if key == "top1_agreement" else f"{value:.1e}")
        print_table(console, table)


def print_lineage(runs: list[dict[str, Any]]) -> None:
    """What `posttrain lineage` found, a run after the other, the newest first."""
    for run in runs:
        print(f"{run['run']}  {run['method']}, started from {run['started_from']}")
        print(f"  rows {run.get('data_fingerprint', '')[:12] or 'unknown'}; its folder of data is {run['data']}")
        for name, digest in run["sets"].items():
            print(f"    {name}  {digest[:12]}")
        for source in run["sources"]:
            for file in source["files"]:
                facts = (source["key"], f"{file['rows']:,} rows", file["fingerprint"][:12], file["state"], file["uri"])
                print("   ", *facts, sep="  ")
        print(f"  tokens {run.get('tokens_sha256', '')[:12] or 'unknown'}; their folder is {run['tokens']}")
        for shard in run["shards"]:
            print(f"    {shard['rows']:,} units  {shard['state']}  {shard['uri']}")


def print_checks(found: list[dict[str, str]]) -> None:
    """What `posttrain doctor` found: a line a check, and under one that needs it what to do."""
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    for check in found:
        mark = "[red]fix[/red]" if check["fix"] else "[green]ok[/green]"
        table.add_row(mark, escape(check["name"]), escape(check["found"]))
        if check["fix"]:
            table.add_row("", "", f"[bold]{escape(check['fix'])}[/bold]")
    console.print(table)
    wrong = sum(bool(check["fix"]) for check in found)
    console.print("all well" if not wrong else f"{wrong} to fix", style="bold")
