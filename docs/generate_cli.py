"""Write docs/cli.md from the commands themselves: `python docs/generate_cli.py`."""

from pathlib import Path
from typing import Any

import typer

from posttrain.cli import app

HEAD = """# Command line

Generated from `lib/posttrain/cli.py` by `make docs`; do not edit by hand.

Runs are started by their flows, `python flows/grpo_flow.py run`; these commands stand beside them. Results are for a
person, or with `--json` JSON alone. A known error is one message on stderr and exit status 1: [Errors](errors.md).
"""


def documents() -> dict[str, str]:
    """File name -> its text."""
    return {"cli.md": "\n".join([HEAD, *_commands(typer.main.get_command(app), "posttrain")])}


def _commands(group: Any, path: str) -> list[str]:
    parts = []
    for name, command in group.commands.items():
        where = f"{path} {name}"
        parts += _commands(command, where) if hasattr(command, "commands") else [_command(command, where)]
    return parts


def _command(command: Any, path: str) -> str:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    words = [each.metavar if each.required else f"[{each.metavar}]" for each in arguments]
    words += [
        f"{each.opts[0]} {each.name.upper()}" for each in command.params if each not in arguments and each.required
    ]
    usage = " ".join([path, *words])
    lines = [f"## {path}\n", f"    {usage}\n", f"{command.help}\n", "| | |", "|---|---|"]
    for each in command.params:
        name = each.metavar if each in arguments else ", ".join([*each.opts, *each.secondary_opts])
        default = "" if each.default in (None, False, True) or each.required else f" Default: {each.default}."
        lines.append(f"| `{name}` | {each.help}{default} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for name, text in documents().items():
        (Path(__file__).parent / name).write_text(text)
