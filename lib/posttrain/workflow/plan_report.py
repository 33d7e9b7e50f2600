"""A plan on the terminal: what steps/estimate.py found, as tables for a person."""

from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 2**30


def print_plan(plan: dict[str, Any]) -> None:
    """Print parameters, memory by part, time, disk, and what to change where it does not fit."""
    console = Console(highlight=False)
    setup, counts = plan["setup"], plan["parameters"]
    console.print(
        f"{plan['gpus']} x {plan['gpu']}: {counts['total'] / 1e6:,.1f} M parameters, {counts['trained'] / 1e6:,.1f} M "
        f"trained, {counts['active'] / 1e6:,.1f} M met by a token; {setup['precision']}, packs of "
        f"{setup['pack_tokens']:,} tokens, {setup['data']} data ranks",
        markup=False,
        soft_wrap=True,
    )
    console.print(_memory(plan))
    console.print(_times(plan))
    cost = "" if plan["cost"] is None else f", cost {plan['cost']:,.2f}"
    disk = ", ".join(f"{name} {size / GIB:,.1f}" for name, size in plan["disk"].items())
    console.print(f"{plan['hours']:,.2f} hours{cost}. Disk, GiB: {disk}. Host: {plan['host_bytes'] / GIB:,.1f} GiB")
    console.print("assumed: " + "; ".join(plan["assumptions"]), markup=False, soft_wrap=True)
    if plan["fits"]:
        return
    table = Table("change", "GiB", "fits", title="does not fit; the least harmful change first", title_justify="left")
    for each in plan["changes"]:
        table.add_row(each["change"], f"{each['total'] / GIB:,.1f}", "yes" if each["fits"] else "no")
    console.print(table)


def _memory(plan: dict[str, Any]) -> Table:
    sizes = dict(plan["memory"])
    moment, error, total = sizes.pop("moment"), sizes.pop("error"), sizes.pop("total")
    table = Table(title=f"memory of a GPU at its fullest, {moment}", title_justify="left")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for name, size in sizes.items():
        if size:
            table.add_row(name, f"{size / GIB:,.2f}")
    table.add_section()
    table.add_row(f"total, within {error:.0%}", f"{total / GIB:,.2f}")
    table.add_row(f"of a {plan['gpu']}", f"{plan['usable_bytes'] / GIB:,.2f}")
    return table


def _times(plan: dict[str, Any]) -> Table:
    table = Table(title=f"time, at an MFU of {plan['mfu']:g}", title_justify="left")
    table.add_column("stage")
    for name in ("steps", "tokens a step", "s a step", "of it sampling", "tokens/s", "hours"):
        table.add_column(name, justify="right")
    for each in plan["stages"]:
        seconds = each["step_s"] + each["sampling_s"]
        numbers = (f"{each['steps']:,}", f"{each['tokens_per_step']:,}", f"{seconds:,.3g}")
        rest = (f"{each['sampling_s']:,.3g}", f"{each['tokens_per_s']:,.0f}", f"{each['hours']:,.2f}")
        table.add_row(each["name"], *numbers, *rest)
    return table
