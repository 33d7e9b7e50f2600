"""A plan on the terminal: what steps/estimate.py found, as tables for a person."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from posttrain.terminal_table import print_table
from posttrain.workflow import markup

GIB = 2**30
LEAST = 0.005
"""GiB that are still shown as a number."""


def print_plan(plan: dict[str, Any]) -> None:
    """Print parameters, memory by part, time, disk, and what to change where it does not fit."""
    console = Console(highlight=False)
    setup, counts = plan["setup"], plan["parameters"]
    console.print(
        f"{plan['gpus']} x {plan['gpu']}: {counts['total'] / 1e6:,.1f} M parameters, {counts['trained'] / 1e6:,.1f} M "
        f"trained, {counts['active'] / 1e6:,.1f} M met by a token; {setup['precision']}, packs of "
        f"{setup['pack_tokens']:,} tokens, {setup['data']} data ranks",
        markup=False,
        soft_wrap=not console.is_terminal,
    )
    moment = plan["memory"]["moment"]
    _print(console, "Memory", f"Of a GPU at its fullest: {moment}.", _memory(plan))
    mfu = f"At an MFU of {plan['mfu']:g}, the share of the GPU's peak that is used; --mfu takes your own."
    _print(console, "Time", mfu, _times(plan))
    cost = "" if plan["cost"] is None else f", cost {plan['cost']:,.2f}"
    disk = ", ".join(f"{name} {_gib(size)}" for name, size in plan["disk"].items())
    for line in (
        f"In all: {markup.duration(plan['hours'] * 3600)}{cost}",
        f"Disk: {disk} GiB",
        f"Host memory: {_gib(plan['host_bytes'])} GiB",
        "Assumed: " + "; ".join(plan["assumptions"]),
    ):
        console.print(line, markup=False, soft_wrap=not console.is_terminal)
    if plan["fits"]:
        return
    table = Table("change", box=SIMPLE_HEAD)
    table.add_column("GiB", justify="right")
    table.add_column("fits")
    for each in plan["changes"]:
        table.add_row(each["change"], _gib(each["total"]), "yes" if each["fits"] else "no")
    _print(console, "It does not fit", "What would help, the least harmful change first.", table)


def _print(console: Console, title: str, note: str, table: Table) -> None:
    console.print(f"\n[bold]{title}[/bold]  {note}")
    print_table(console, table)


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}" if size / GIB >= LEAST else "< 0.01"


def _memory(plan: dict[str, Any]) -> Table:
    sizes = {name: size for name, size in plan["memory"].items() if name not in ("moment", "error", "total")}
    table = Table("part", box=SIMPLE_HEAD)
    table.add_column("GiB", justify="right")
    for name, size in sizes.items():
        if size:
            table.add_row(name, _gib(size))
    table.add_section()
    table.add_row(f"total, within {plan['memory']['error']:.0%}", _gib(plan["memory"]["total"]))
    table.add_row(f"what the {plan['gpu']} has", _gib(plan["usable_bytes"]))
    return table


def _times(plan: dict[str, Any]) -> Table:
    table = Table("stage", box=SIMPLE_HEAD)
    for name in ("steps", "tokens a step", "a step", "of it sampling", "tokens/s", "in all"):
        table.add_column(name, justify="right")
    for each in plan["stages"]:
        numbers = (f"{each['steps']:,}", f"{each['tokens_per_step']:,}", _seconds(each["step_s"] + each["sampling_s"]))
        rest = (_seconds(each["sampling_s"]), f"{each['tokens_per_s']:,.0f}", markup.duration(each["hours"] * 3600))
        table.add_row(each["name"], *numbers, *rest)
    return table


def _seconds(value: float) -> str:
    return "-" if not value else "< 1 ms" if value < 1e-3 else f"{value:,.3g} s"
